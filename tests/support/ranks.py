"""Ranks of one model on threads of the test's process, which meet and talk as processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stepwell.config.load import Place, validate
from stepwell.config.schema import EngineOptions
from stepwell.engine.build import assemble
from stepwell.engine.local import LocalEngine
from stepwell.engine.ranks import Leader, follow, gather
from stepwell.engine.steps import Step, StepExecutor, StepResult
from stepwell.parallel.group import Group, Work
from stepwell.parallel.ranks import Ranks

Watch = Callable[[StepExecutor, Ranks], StepExecutor]


class Polite:
    """A group whose ranks load one at a time, as transformers can't do it on two threads, and wait for nobody meanwhile."""

    def __init__(self, group: Group, turn: threading.Lock):
        self._group, self._turn = group, turn
        self.is_loading = True

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work:
        return self._while_others_load(lambda: self._group.allgather(outputs, inputs))

    def broadcast(self, tensor: Tensor, root: int) -> Work:
        return self._while_others_load(lambda: self._group.broadcast(tensor, root))

    def alltoall_base(self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int]) -> Work:
        return self._group.alltoall_base(output, input, output_sizes, input_sizes)  # once all have loaded

    def _while_others_load(self, talk: Callable[[], Work]) -> Work:
        if not self.is_loading:
            return talk()
        self._turn.release()
        try:
            work = talk()
            work.wait()
            return work
        finally:
            self._turn.acquire()


def ranked_engine(size: int, watch: Watch = lambda worker, _: worker, **options: object) -> LocalEngine:
    """An engine whose model runs on so many ranks. `watch` may stand before each one's worker."""
    made = validate(EngineOptions, {"num_gpus": size, "threads": 1, **options})
    turn = threading.Lock()

    def build(_: EngineOptions, ranks: Ranks) -> StepExecutor:
        assert ranks.group is not None
        group = Polite(ranks.group, turn)
        with turn:
            worker = assemble(made, replace(ranks, group=group))  # a team talks only once a step is taken
            group.is_loading = False
        return watch(worker, ranks)

    def lead() -> StepExecutor:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        places = [Place(rank, size, rank, size, "127.0.0.1", store.port, has_store=True) for rank in range(size)]
        for place in places[1:]:
            threading.Thread(target=follow, args=(made, place, build), daemon=True).start()
        company = gather(made, places[0])
        return Leader(build(made, company.ranks), company)

    return LocalEngine(lead)


class Spoiled:
    """A worker whose first step of a stage fails: `spoil` breaks the stage, or what is in it, and returns what mends that."""

    def __init__(self, worker: StepExecutor, spoil: Callable[[Any], Callable[[], None]], stage: str = "denoise"):
        self.models, self.batch_tokens, self.choices = worker.models, worker.batch_tokens, worker.choices
        self.plan, self.free, self.forget = worker.plan, worker.free, worker.forget
        self.held, self.close, self._worker = worker.held, worker.close, worker
        self._stage = stage
        self._spoil: Callable[[Any], Callable[[], None]] | None = spoil

    def execute(self, step: Step) -> StepResult:
        if step.stage != self._stage or self._spoil is None:
            return self._worker.execute(step)
        stages: Any = self._worker
        mend, self._spoil = self._spoil(stages._stages[self._stage]), None
        try:
            result = self._worker.execute(step)
            assert all(item.error for item in result.items)
            return result
        finally:
            mend()

"""Ranks of one model on the engine's side: how they meet, how the first leads and how the others follow.

The first rank has the scheduler; every step it takes goes to the others as it is, and each executes it with its own worker. They
are processes that the first one starts on its own host, or that torchrun has started, on any host. The group is made anew with
every life of the first one's engine: under torchrun the others then wait for it, those it has started end with it.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import cast

import torch
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from stepwell.config.load import Place
from stepwell.config.schema import EngineOptions
from stepwell.config.sequence import check_ranks, degrees
from stepwell.engine.steps import StagePlan, Step, StepExecutor, StepResult
from stepwell.engine.wire import Free, Shut, pack, unpack
from stepwell.errors import InvalidRequest, WorkerLost
from stepwell.parallel.group import Group, Lost
from stepwell.parallel.ranks import Ranks
from stepwell.parallel.team import Team
from stepwell.types import Request

logger = logging.getLogger(__name__)
FOREVER = timedelta(days=3650)  # of waiting for a step; a rank that is gone ends it at once
MEET_S = 300
LOOK_S = 0.2  # between looks whether the first rank has a new life
COME_S = 0.05  # between looks whether others have come
LIFE = "stepwell/life"
AGAIN = "what is killed begins again, as nothing is saved between"


@dataclass(slots=True)
class Company:
    """The ranks this process is one of, and what ends with it."""

    ranks: Ranks
    store: Store  # lives as long as they do
    started: list[subprocess.Popen[bytes]]

    def part(self) -> None:
        """Let the others go; those that were started here are gone afterwards."""
        for process in self.started:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.started.clear()

    def abandon(self) -> None:
        """End those that were started here, whatever they do."""
        for process in self.started:
            process.kill()
        self.part()


def ranked(options: EngineOptions, place: Place | None) -> EngineOptions:
    """The same options with the number of ranks in them: torchrun's, if it started this. Raises InvalidRequest."""
    size = 1 if place is None else place.size
    if size > 1 and "num_gpus" in options.model_fields_set and options.num_gpus != size:
        raise InvalidRequest(f"num_gpus = {options.num_gpus}: torchrun has started {size} ranks", param="num_gpus")
    if size == 1 and "num_gpus" not in options.model_fields_set:
        size = options.tp_size
    options = options.model_copy(update={"num_gpus": size}) if size > 1 else options
    check_ranks(options)
    return options


def ranks_line(options: EngineOptions) -> tuple[str, str, str]:
    """What several processes do, for people."""
    if options.tp_size > 1:
        why = f"each of as many processes has its part of the heads, channels and cached keys; their sums go round, {AGAIN}"
        return "tp_size", str(options.tp_size), why
    ulysses, ring = degrees(options)
    what = "samples and guidance branches" if options.enable_cfg_parallel else "samples"
    whom = "as many processes" if ulysses * ring == 1 else f"teams of {ulysses * ring} processes"
    how = {(False, False): "", (True, False): ", which swap heads", (False, True): ", in a ring",
           (True, True): f", {ulysses} of which swap heads, in a ring of {ring}"}[ulysses > 1, ring > 1]  # fmt: skip
    decoding = ", and so is decoding" if options.vae_sp else ""
    why = f"{what} of a step are spread over {whom}{how}{decoding}; {AGAIN}"
    return "num_gpus", str(options.num_gpus), why


def gather(options: EngineOptions, place: Place | None) -> Company:
    """Make this process the first rank, and meet the others. Raises InvalidRequest for a number of them that can't be, and
    WorkerLost where they don't come."""
    size = options.num_gpus
    if place is None:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place, started = Place(0, size, 0, size, "127.0.0.1", store.port, has_store=False), []
        for rank in range(1, size):
            command = [sys.executable, "-m", "stepwell.engine.follower", *map(str, (rank, size, store.port, os.getpid()))]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)  # Ctrl-C is this one's to handle
            assert process.stdin is not None
            process.stdin.write(options.model_dump_json(exclude_unset=True).encode())
            process.stdin.close()
            started.append(process)
    else:
        store, started = _store(place), []
    life = uuid.uuid4().hex
    store.set(LIFE, life)
    try:
        _expect(store, life, started)
        return Company(_meet(store, life, place, options), store, started)
    except BaseException as error:
        for process in started:
            process.kill()
            process.wait()
        if not isinstance(error, RuntimeError):
            raise
        text = " ".join(str(error).split())[:300]
        raise WorkerLost(f"num_gpus = {size}: the other ranks did not come within {MEET_S} s ({text})") from error


def _expect(store: Store, life: str, started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until those that were started here are about to meet this one, for as long as they are there. Raises WorkerLost."""
    names, until = [_here(life, rank) for rank in range(1, len(started) + 1)], time.monotonic() + MEET_S
    while names and time.monotonic() < until and not store.check(names):
        for rank, process in enumerate(started, 1):
            if (code := process.poll()) is not None:
                size = len(started) + 1
                raise WorkerLost(f"num_gpus = {size}: rank {rank} died before it could load the model (exit code {code})")
        time.sleep(COME_S)


def _here(life: str, rank: int) -> str:
    """What a rank that was started by the first one sets once it is about to meet it."""
    return f"{life}/here/{rank}"


Build = Callable[[EngineOptions, Ranks], StepExecutor]


def follow(options: EngineOptions, place: Place, build: Build) -> None:
    """Be another rank for one life of the first: do what it does, until it says that it is over. Raises Lost if it is gone
    before, or a rank is."""
    store = _store(place)
    life = store.get(LIFE).decode()
    store.set(_here(life, place.rank), "")
    _obey(options, _meet(store, life, place, options), build)


def follow_on(options: EngineOptions, place: Place, build: Build) -> None:
    """`follow`, from one life of the first rank to the next, until one ends as it should."""
    last = b""
    while True:
        store = _store(place)
        while (life := store.get(LIFE)) == last:
            time.sleep(LOOK_S)
        last = life
        try:
            ranks = _meet(store, life.decode(), place, options)
        except RuntimeError as error:  # it was gone before all had met
            logger.warning("could not meet the first rank: %s", error)
            continue
        try:
            return _obey(options, ranks, build)
        except Lost as error:
            logger.warning("%s; waiting for its next life", error)
        gc.collect()  # a model is full of cycles, and the next life loads another


def _obey(options: EngineOptions, ranks: Ranks, build: Build) -> None:
    """Execute what the first rank does, until that is over."""
    worker = build(options, ranks)
    while not isinstance(command := unpack(ranks.first(b"")), Shut):
        if isinstance(command, Step):
            worker.execute(command)
        else:
            assert isinstance(command, Free)
            worker.free(command.sample_ids)
    worker.close()


def _store(place: Place) -> TCPStore:
    """Where the ranks of torchrun's meet; it is torchrun's own, or else the first rank's."""
    is_master = place.rank == 0 and not place.has_store
    return TCPStore(place.address, place.port, is_master=is_master, wait_for_workers=False, timeout=FOREVER)


def _meet(store: Store, life: str, place: Place, options: EngineOptions) -> Ranks:
    """The group of one life of the first rank, and this process's device and threads in it."""
    if options.device != "cpu" and torch.cuda.is_available():
        if place.local_size > torch.cuda.device_count():
            raise InvalidRequest(
                f"num_gpus = {place.size}: {place.local_size} ranks on a host where torch sees {torch.cuda.device_count()} GPUs",
                param="num_gpus",
            )
        torch.cuda.set_device(place.local_rank)
    elif options.threads is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))
    store.set_timeout(timedelta(seconds=MEET_S))
    group = ProcessGroupGloo(PrefixStore(life, store), place.rank, place.size, FOREVER)
    return Ranks(place.rank, place.size, options.enable_cfg_parallel, cast(Group, group), _team(store, life, place, options))


def _team(store: Store, life: str, place: Place, options: EngineOptions) -> Team:
    """The ranks that hold a sequence, or a model, together with this one: neighbours."""
    ulysses, ring = degrees(options)
    size = ulysses * ring * options.tp_size
    if size == 1:
        return Team()
    number, member = divmod(place.rank, size)
    group = ProcessGroupGloo(PrefixStore(f"{life}/{number}", store), member, size, FOREVER)
    return Team(ulysses, ring, member, cast(Group, group), options.tp_size)


class Leader:
    """Implements `StepExecutor` by the first rank's worker: every other rank does what it does."""

    def __init__(self, worker: StepExecutor, company: Company):
        self._worker, self._company = worker, company
        size, split = company.ranks.size, company.ranks.team.tensor  # of those that split weights all compute all tokens
        self.models = tuple(replace(model, num_gpus=size) for model in worker.models)
        self.batch_tokens = {name: tokens * size // split for name, tokens in worker.batch_tokens.items()}
        self.choices = worker.choices

    def plan(self, request: Request) -> tuple[StagePlan, ...]:
        return self._worker.plan(request)

    def execute(self, step: Step) -> StepResult:
        self._company.ranks.first(pack(step))
        return self._worker.execute(step)

    def free(self, sample_ids: tuple[str, ...]) -> None:
        try:
            self._company.ranks.first(pack(Free(sample_ids)))
        except Lost:
            logger.debug("a rank is gone, which the next step says")
        self._worker.free(sample_ids)

    def forget(self, request: Request) -> None:
        self._worker.forget(request)

    def held(self) -> int:
        return self._worker.held()

    def close(self) -> None:
        try:
            self._company.ranks.first(pack(Shut()))
        except Lost:
            logger.warning("a rank was gone before the end")
        self._worker.close()
        self._company.part()

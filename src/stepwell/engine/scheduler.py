"""Decides, between any two steps, which samples advance next. Pure Python: no torch, no clock, no threads.

Order: higher priority first; then the least remaining work, divided by how a sample has waited ("shortest remaining first with
ageing"). Time is measured in tokens of work done, so the policy is deterministic: of a sample whose own work is S and that has
waited while W tokens were computed for others, what remains counts (1 + AGEING · W / S)² times less. So waiting counts in
proportion to one's size: a request r times as large as those that keep coming is overtaken until W is about
(√r − 1) · S / AGEING, and a small one waits no longer for large ones, however old, than a few times its own work. (Were
AGEING · W subtracted instead, it would stand behind all of them.) Nobody waits in steps that they are part of.

Batching: the first sample in that order leads; others at the same stage join it while the step stays within the token
budget that saturates the device. Beyond saturation a batch only makes everyone wait. Where the leader leaves room,
samples waiting in earlier stages are brought forward first, so that they can join, if that takes a step each and no more.
A step never mixes models. Across models a token counts for what it costs (`StagePlan.cost`); budgets are in a model's own.

That is "shortest". The other policy, "fifo", is what servers do that work request by request: whoever came first runs to
its end, in company of its own outputs only, and priority means nothing. It is there to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stepwell.engine.api import QueueEntry
from stepwell.engine.steps import NewSample, StagePlan, Step
from stepwell.errors import InvalidRequest, QueueFull
from stepwell.types import Request, SchedulingPolicy

AGEING = 0.25


@dataclass(slots=True, eq=False)
class Sample:
    """One output in flight: where it is, and what is left to do. No tensors."""

    id: str
    request: Request
    index: int
    plan: tuple[StagePlan, ...]
    arrived_at: int  # work done when it came
    order: int
    stage: int = 0
    step: int = 0
    is_started: bool = False
    work: int = 0
    remaining: int = 0
    shared: int = 0  # work done for others in steps that it was part of
    resumed: dict[str, int] = field(default_factory=dict)  # steps, by stage, that an earlier process took

    def __post_init__(self) -> None:
        self.work = self.remaining = sum(stage.steps * stage.cost for stage in self.plan)
        self._pass_by()

    def enter_next_stage(self) -> None:
        self.stage += 1
        self._pass_by()

    def _pass_by(self) -> None:
        """Skip stages in which there is nothing to do; every plan of a model lists the same stages."""
        while self.stage < len(self.plan) and self.plan[self.stage].steps <= self.resumed.get(self.plan[self.stage].name, 0):
            self.stage += 1
        self.step = self.resumed.get(self.plan[self.stage].name, 0) if self.stage < len(self.plan) else 0

    def is_near(self, stage: int) -> bool:
        """Whether it will be at a later stage in no time: nobody waits while others take all steps of a stage of many."""
        return self.stage < stage and all(between.steps <= 1 for between in self.plan[self.stage : stage])

    @property
    def current(self) -> StagePlan:
        return self.plan[self.stage]


class Scheduler:
    """The queue and the policy. One owner; not thread-safe. ageing: another one than what is served, to compare with."""

    def __init__(
        self,
        batch_tokens: Mapping[str, int],
        max_running: int = 32,
        max_queued: int = 1024,
        policy: SchedulingPolicy = "shortest",
        ageing: float = AGEING,
    ):
        self.batch_tokens = batch_tokens
        self.max_running = max_running
        self.max_queued = max_queued
        self.policy = policy
        self.ageing = ageing
        self._samples: dict[str, Sample] = {}
        self._by_request: dict[str, list[str]] = {}
        self._work_done = 0
        self._arrivals = 0
        self._running = 0

    # ------------------------------------------------------------------------------------------------------- in and out
    def add(self, request: Request, plan: tuple[StagePlan, ...]) -> int:
        """Queue every output of a request; returns how many samples are ahead. Raises QueueFull."""
        count = request.sampling.num_outputs
        assert count is not None
        ahead = len(self._samples)
        if count > self.max_queued:
            raise InvalidRequest(
                f"num_outputs_per_prompt = {count}: the queue holds {self.max_queued}", param="num_outputs_per_prompt"
            )
        if self.queued + count > self.max_queued:
            raise QueueFull(f"{self.queued} samples are waiting, and the queue holds {self.max_queued}; try again later")
        ids = [f"{request.id}/{index}" for index in range(count)]
        for index, sample_id in enumerate(ids):
            self._samples[sample_id] = Sample(sample_id, request, index, plan, self._work_done, self._arrivals)
            self._arrivals += 1
        self._by_request[request.id] = ids
        return ahead

    def remove(self, request_id: str) -> tuple[str, ...]:
        """Forget a request; returns the samples of it that were still here."""
        ids = tuple(i for i in self._by_request.pop(request_id, []) if i in self._samples)
        for sample_id in ids:
            self._running -= self._samples.pop(sample_id).is_started
        return ids

    @property
    def queued(self) -> int:
        return len(self._samples) - self._running

    @property
    def running(self) -> int:
        return self._running

    def tokens_left(self) -> int:
        """Work still to be done for everybody here."""
        return sum(sample.remaining for sample in list(self._samples.values()))

    def overview(self) -> tuple[QueueEntry, ...]:
        """Live requests in the order in which they are expected to end."""
        order = sorted(list(self._samples.values()), key=self._key)
        ahead = 0
        entries: dict[str, QueueEntry] = {}
        for sample in order:
            known = entries.get(sample.request.id)
            left = sample.remaining + (known.tokens_left if known else 0)
            running = sample.is_started or (known is not None and known.is_running)
            # what goes first is all before the request's last sample, less its own
            entries[sample.request.id] = QueueEntry(sample.request.id, running, left, ahead + sample.remaining - left)
            ahead += sample.remaining
        return tuple(sorted(entries.values(), key=lambda entry: entry.tokens_ahead + entry.tokens_left))

    def tokens(self, step: Step) -> int:
        """The tokens of a step."""
        return sum(self._samples[sample_id].current.tokens for sample_id, _ in step.items)

    def cost(self, step: Step) -> int:
        """The same by what they cost beside those of other models."""
        return sum(self._samples[sample_id].current.cost for sample_id, _ in step.items)

    # ------------------------------------------------------------------------------------------------------------ policy
    def schedule(self) -> Step | None:
        """The next step, or None if there is nothing to do."""
        if not self._samples:
            return None
        order = self._runnable()
        leader = order[0]
        order = [sample for sample in order if sample.request.model == leader.request.model]
        budget = self.batch_tokens[leader.request.model]
        batch = self._fill(leader.stage, order, budget)
        if leader.current.steps > 1 and leader.current.packs:
            spare = budget - sum(sample.current.tokens for sample in batch)
            waiting = [s for s in order if s.is_near(leader.stage) and s.plan[leader.stage].tokens <= spare]
            if waiting:
                batch = self._fill(waiting[0].stage, self._joiners(waiting, leader.stage, spare), budget)
        return self._start(batch)

    def _runnable(self) -> list[Sample]:
        """Started samples and as many new ones as there is room for, in order."""
        order = sorted(self._samples.values(), key=self._key)
        if self.policy == "fifo":
            order = [sample for sample in order if sample.request.id == order[0].request.id]
        room = self.max_running - self._running
        out = []
        for sample in order:
            if sample.is_started:
                out.append(sample)
            elif room > 0:
                out.append(sample)
                room -= 1
        return out

    def _key(self, sample: Sample) -> tuple[float, float, int]:
        if self.policy == "fifo":
            return 0, 0, sample.order
        waited = self._work_done - sample.arrived_at - (sample.work - sample.remaining) - sample.shared
        aged = 1 + self.ageing * max(0, waited) / max(1, sample.work)
        return -sample.request.priority, sample.remaining / aged**2, sample.order

    def _fill(self, stage: int, order: list[Sample], budget: int) -> list[Sample]:
        """The first sample at `stage` and those after it that fit into the budget with it."""
        batch: list[Sample] = []
        for sample in order:
            if sample.stage != stage:
                continue
            if not batch or (sample.current.packs and batch[0].current.packs and sample.current.tokens <= budget):
                batch.append(sample)
                budget -= sample.current.tokens
        return batch

    def _joiners(self, waiting: list[Sample], target: int, spare: int) -> list[Sample]:
        """Samples of one earlier stage that will fit beside the leader once they are at its stage."""
        joiners = []
        for sample in waiting:
            if sample.stage == waiting[0].stage and sample.plan[target].tokens <= spare:
                joiners.append(sample)
                spare -= sample.plan[target].tokens
        return joiners

    def _start(self, batch: list[Sample]) -> Step:
        new = tuple(NewSample(s.id, s.request, s.index) for s in batch if not s.is_started)
        cost = sum(sample.current.cost for sample in batch)
        for sample in batch:
            sample.shared += cost - sample.current.cost
            self._running += not sample.is_started
            sample.is_started = True
        return Step(batch[0].current.name, tuple((s.id, s.step) for s in batch), new, batch[0].request.model)

    # ----------------------------------------------------------------------------------------------------------- outcome
    def advance(self, sample_id: str, *, stage_is_done: bool) -> bool:
        """Count a step taken. True if the sample has left its last stage; it is forgotten then."""
        sample = self._samples[sample_id]
        cost = sample.current.cost
        self._work_done += cost
        sample.remaining -= cost
        sample.step += 1
        if stage_is_done:
            sample.remaining -= cost * (sample.current.steps - sample.step)
            sample.enter_next_stage()
        if sample.stage < len(sample.plan):
            return False
        self._running -= 1
        del self._samples[sample_id]
        return True

    def share(self, sample_id: str) -> float:
        """How much of a sample's work is done, 0 to 1."""
        sample = self._samples[sample_id]
        return 1 - sample.remaining / sample.work

    def resume(self, sample_id: str, steps: dict[str, int]) -> None:
        """A sample that has just begun need not take these steps, by stage: an earlier process did."""
        sample = self._samples[sample_id]
        spared = sum(stage.cost * steps.get(stage.name, 0) for stage in sample.plan)
        sample.resumed = steps
        sample.remaining -= spared
        sample.arrived_at -= spared  # as if it had been here then, so that it has waited for no less

    def position(self, sample_id: str) -> StagePlan:
        """The stage a sample is at."""
        return self._samples[sample_id].current

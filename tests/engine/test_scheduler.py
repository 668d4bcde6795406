"""The policy, on plain data: order, ageing, batching up to saturation, joining, admission."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.engine.scheduler import AGEING, Scheduler
from stepwell.engine.steps import StagePlan, Step
from stepwell.errors import QueueFull
from stepwell.types import Request, SamplingParams


def request(name: str, *, priority: int = 0, outputs: int = 1) -> Request:
    return Request(name, SamplingParams(num_outputs=outputs), id=name, priority=priority)


def plan(steps: int, tokens: int, *, packs: bool = True) -> tuple[StagePlan, ...]:
    return (
        StagePlan("encode", 1, 1, True),
        StagePlan("denoise", steps, tokens, packs),
        StagePlan("decode", 1, 1, True),
    )


def take(scheduler: Scheduler) -> Step:
    """Schedule a step and report it as taken."""
    step = scheduler.schedule()
    assert step is not None
    for sample_id, _ in step.items:
        position = scheduler.position(sample_id)
        index = scheduler._samples[sample_id].step
        scheduler.advance(sample_id, stage_is_done=index + 1 == position.steps)
    return step


def names(step: Step) -> list[str]:
    return [sample_id.split("/")[0] for sample_id, _ in step.items]


def finish_order(scheduler: Scheduler, limit: int = 10_000) -> list[str]:
    order: list[str] = []
    for _ in range(limit):
        alive = set(scheduler._samples)
        if not alive:
            return order
        take(scheduler)
        order += [sample_id.split("/")[0] for sample_id in sorted(alive - set(scheduler._samples))]
    raise AssertionError("the queue never drains")


def test_the_shortest_goes_first_and_overtakes_a_running_one() -> None:
    scheduler = Scheduler({"": 100})
    scheduler.add(request("large"), plan(50, 100))
    for _ in range(5):
        assert names(take(scheduler)) == ["large"]
    scheduler.add(request("small"), plan(4, 100))
    assert finish_order(scheduler) == ["small", "large"]


def test_nobody_waits_for_others_to_come_through_a_stage_of_many_steps() -> None:
    """A stage of many steps after denoising, as decoding a video is, begins though others could join it much later."""
    scheduler = Scheduler({"": 100})
    for name, steps in (("small", 4), ("large", 1000)):
        scheduler.add(request(name), (*plan(steps, 10)[:2], StagePlan("decode", 5, 10, True)))
    stages = [take(scheduler).stage for _ in range(10)]
    assert stages == ["encode", *["denoise"] * 4, *["decode"] * 5]
    assert not any(sample_id.startswith("small") for sample_id in scheduler._samples)


def test_priority_beats_size() -> None:
    scheduler = Scheduler({"": 100})
    scheduler.add(request("small"), plan(4, 100))
    scheduler.add(request("urgent", priority=1), plan(50, 100))
    assert finish_order(scheduler) == ["urgent", "small"]


def test_a_large_request_is_not_starved_by_a_stream_of_small_ones() -> None:
    """It may be overtaken by those that come while about (√r − 1) · its own work / AGEING is done for others."""
    scheduler = Scheduler({"": 10})
    scheduler.add(request("large"), plan(20, 10))  # 202 tokens of work; a small one is 22
    arrived = 0
    while "large/0" in scheduler._samples:
        scheduler.add(request(f"small{arrived}"), plan(2, 10))
        arrived += 1
        for _ in range(4):
            take(scheduler)
    left = len(scheduler._samples)
    most = (math.sqrt(202 / 22) - 1) * 202 / AGEING // 22
    assert 202 // 22 < most // 2 < arrived - left <= 1.5 * most


def test_a_small_request_does_not_wait_for_old_large_ones() -> None:
    """Nine large ones have waited for one another for long, of which a small one knows nothing."""
    scheduler = Scheduler({"": 10})
    for name in "abcdefghi":
        scheduler.add(request(name), plan(100, 10))
    for _ in range(700):
        take(scheduler)
    assert len(scheduler._samples) > 1
    scheduler.add(request("small"), plan(4, 10))
    assert finish_order(scheduler) == ["g", "small", "h", "i"]  # of g little is left


def test_nobody_ages_in_steps_they_are_part_of() -> None:
    scheduler = Scheduler({"": 100})
    for name in "abcdefgh":
        scheduler.add(request(name), plan(1000, 10))
    for _ in range(900):
        assert len(take(scheduler).items) == 8
    scheduler.add(request("small"), plan(4, 10, packs=False))
    assert [names(take(scheduler)) for _ in range(6)] == [["small"]] * 6


def test_batches_only_up_to_the_budget() -> None:
    scheduler = Scheduler({"": 100})
    for number in range(5):
        scheduler.add(request(f"r{number}"), plan(3, 30))
    denoising = [step for step in iter(lambda: take(scheduler) if scheduler._samples else None, None) if step.stage == "denoise"]
    assert max(len(step.items) for step in denoising) == 3
    assert sum(len(step.items) for step in denoising) == 15


def test_a_step_larger_than_the_budget_runs_alone() -> None:
    scheduler = Scheduler({"": 100})
    scheduler.add(request("huge"), plan(2, 1000))
    scheduler.add(request("tiny", priority=-1), plan(2, 1))
    steps = []
    while scheduler._samples:
        step = take(scheduler)
        steps.append((step.stage, names(step)))
    assert ("denoise", ["huge"]) in steps
    assert not [step for step in steps if step[0] == "denoise" and len(step[1]) > 1]


def test_waiting_requests_are_brought_forward_to_join_a_running_one() -> None:
    scheduler = Scheduler({"": 100})
    scheduler.add(request("first"), plan(10, 30))
    take(scheduler), take(scheduler)
    scheduler.add(request("second"), plan(10, 30))
    assert (take(scheduler).stage, take(scheduler).stage) == ("encode", "denoise")
    assert sorted(names(take(scheduler))) == ["first", "second"]


def test_stages_that_do_not_pack_take_turns() -> None:
    scheduler = Scheduler({"": 1000})
    scheduler.add(request("a", outputs=3), plan(2, 10, packs=False))
    while scheduler._samples:
        step = take(scheduler)
        assert step.stage != "denoise" or len(step.items) == 1


def test_admission_is_bounded() -> None:
    scheduler = Scheduler({"": 10_000}, max_running=2, max_queued=3)
    scheduler.add(request("a", outputs=3), plan(5, 10))
    while True:
        step = take(scheduler)
        assert scheduler.running <= 2
        if step.stage == "denoise":
            assert len(step.items) <= 2
            break
    with pytest.raises(QueueFull, match="3"):
        scheduler.add(request("b", outputs=3), plan(5, 10))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 200), st.integers(-1, 1), st.integers(1, 3), st.integers(0, 5)), max_size=12
    ),
    st.integers(1, 300),
    st.integers(1, 5),
)
def test_every_sample_takes_each_of_its_steps_exactly_once(
    arrivals: list[tuple[int, int, int, int, int]], budget: int, max_running: int
) -> None:
    scheduler = Scheduler({"": budget}, max_running=max_running)
    taken: Counter[tuple[str, str, int]] = Counter()
    expected = 0
    for number, (steps, tokens, priority, outputs, pause) in enumerate(arrivals):
        scheduler.add(request(f"r{number}", priority=priority, outputs=outputs), plan(steps, tokens))
        expected += outputs * (steps + 2)
        for _ in range(pause):
            if scheduler._samples:
                step = take(scheduler)
                taken.update((sample_id, step.stage, index) for sample_id, index in step.items)
    while scheduler._samples:
        step = take(scheduler)
        taken.update((sample_id, step.stage, index) for sample_id, index in step.items)
    assert len(taken) == expected and set(taken.values()) <= {1}
    assert (scheduler.queued, scheduler.running, scheduler.schedule()) == (0, 0, None)


def test_fifo_runs_each_request_to_its_end_in_order_of_arrival() -> None:
    scheduler = Scheduler({"": 100}, policy="fifo")
    scheduler.add(request("large"), plan(50, 10))
    take(scheduler)
    scheduler.add(request("small"), plan(4, 10))
    scheduler.add(request("urgent", priority=1), plan(4, 10))
    assert [entry.request_id for entry in scheduler.overview()] == ["large", "small", "urgent"]
    steps = []
    while scheduler._samples:
        steps.append(names(take(scheduler)))
    assert steps == [["large"]] * 51 + [["small"]] * 6 + [["urgent"]] * 6


def test_fifo_batches_the_outputs_of_one_request() -> None:
    scheduler = Scheduler({"": 100}, policy="fifo")
    scheduler.add(request("two", outputs=2), plan(3, 30))
    scheduler.add(request("other"), plan(3, 30))
    steps = [names(take(scheduler)) for _ in range(5)]
    assert steps[1:4] == [["two", "two"]] * 3


def test_fifo_goes_on_with_the_next_when_the_first_is_given_up() -> None:
    scheduler = Scheduler({"": 100}, max_running=1, policy="fifo")
    scheduler.add(request("first"), plan(9, 10))
    take(scheduler), take(scheduler)
    scheduler.add(request("second"), plan(2, 10))
    scheduler.remove("first")
    assert finish_order(scheduler) == ["second"]

"""The loop under random schedules: every request ends exactly once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepwell.config.schema import EngineOptions
from stepwell.engine.api import Stats
from stepwell.engine.fake import FakeWorker, fake_engine
from stepwell.engine.local import LocalEngine
from stepwell.errors import EngineClosed, InvalidRequest, QueueFull, StepwellError
from stepwell.generator import open_engine
from stepwell.types import Done, Event, Failed, Request, SamplingParams

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["circle", "poison"])),
        st.tuples(st.just("abort"), st.integers(0, 8), st.just(0), st.just("")),
        st.tuples(st.just("wait"), st.integers(0, 3), st.just(0), st.just("")),
    ),
    max_size=12,
)


def play(engine: LocalEngine, actions: list[tuple[str, int, int, str]], side: int) -> None:
    """Carry out a schedule; then every request must have exactly one terminal event, and the engine must be empty."""
    ends: dict[str, list[Event]] = {}
    after_the_end: list[Event] = []
    requests: list[Request] = []
    finished = threading.Condition()

    def sink(event: Event) -> None:
        with finished:
            if ends[event.request_id]:
                after_the_end.append(event)
            if isinstance(event, Done | Failed):
                ends[event.request_id].append(event)
                finished.notify()

    for kind, first, second, prompt in actions:
        if kind == "add":
            sampling = SamplingParams(
                width=side, height=side, num_inference_steps=first, num_outputs=second, max_sequence_length=8
            )
            asked = Request(prompt, sampling)
            ends[asked.id] = []
            requests.append(asked)
            engine.submit(asked, sink)
        elif kind == "abort" and requests:
            engine.cancel(requests[first % len(requests)].id)
        elif kind == "wait":
            time.sleep(first / 1000)
    with finished:
        assert finished.wait_for(lambda: all(ends.values()), timeout=30), "a request never ended"
    core = engine._core
    assert core is not None
    now = core.stats()
    assert (now.held_samples, now.running_samples, now.queued_samples, now.requests) == (0, 0, 0, 0)
    assert not after_the_end
    for asked in requests:
        (end,) = ends[asked.id]
        if isinstance(end, Done):
            assert [o.index for o in end.outputs] == list(range(asked.sampling.num_outputs or 0))
        else:
            assert end.code == "aborted" or "poison" in asked.prompt


@pytest.fixture(scope="module")
def fake() -> LocalEngine:
    engine = fake_engine(step_ms=0.0)
    engine.open()
    return engine


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=ACTIONS)
def test_a_thousand_random_schedules(fake: LocalEngine, actions: list[tuple[str, int, int, str]]) -> None:
    play(fake, actions, side=16)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=ACTIONS)
def test_random_schedules_on_a_real_model(real: LocalEngine, actions: list[tuple[str, int, int, str]]) -> None:
    play(real, [(kind, a, b, prompt.replace("poison", "star")) for kind, a, b, prompt in actions], side=16)


@pytest.fixture(scope="module")
def real(flux_dev: Path) -> LocalEngine:
    engine = open_engine(EngineOptions(model_path=str(flux_dev), threads=1))
    engine.open()
    return engine


def test_one_poisoned_request_does_not_harm_its_batch_mates(fake: LocalEngine) -> None:
    play(fake, [("add", 4, 3, "circle"), ("add", 4, 2, "poison"), ("add", 4, 1, "circle")], side=16)


def test_closing_ends_every_request_and_refuses_new_ones() -> None:
    engine = fake_engine(step_ms=5)
    engine.open()
    events: list[Event] = []
    for _ in range(3):
        engine.submit(Request("circle", SamplingParams(num_inference_steps=500)), events.append)
    engine.shut()
    engine.shut()
    assert [type(e) for e in events if isinstance(e, Done | Failed)] == [Failed] * 3
    with pytest.raises(EngineClosed):
        engine.submit(Request("circle"), events.append)


def test_a_worker_that_breaks_ends_every_request() -> None:
    class Broken(FakeWorker):
        def execute(self, step: object) -> object:  # type: ignore[override]
            raise ZeroDivisionError("a bug in the worker")

    engine = LocalEngine(Broken)  # type: ignore[arg-type]
    engine.open()
    events: list[Event] = []
    engine.submit(Request("circle"), events.append)
    thread = engine._thread
    assert thread is not None
    thread.join(10)
    assert isinstance(events[-1], Failed)
    with pytest.raises(EngineClosed):
        engine.submit(Request("circle"), events.append)


def test_a_full_queue_refuses() -> None:
    engine = fake_engine(step_ms=5, max_running=1, max_queued=2)
    engine.open()
    events: list[Event] = []
    with pytest.raises(QueueFull):
        for _ in range(10):
            engine.submit(Request("circle", SamplingParams(num_inference_steps=200)), events.append)
    engine.shut()


def test_an_id_under_way_is_refused() -> None:
    engine = fake_engine(step_ms=5)
    engine.open()
    asked = Request("circle", SamplingParams(num_inference_steps=200), id="mine")
    engine.submit(asked, lambda _: None)
    with pytest.raises(InvalidRequest, match="mine"):
        engine.submit(asked, lambda _: None)
    engine.shut()


def test_a_build_that_fails_raises_from_start() -> None:
    def build() -> FakeWorker:
        raise StepwellError("no such thing")

    engine = LocalEngine(build)
    with pytest.raises(StepwellError, match="no such thing"):
        engine.open()


def test_the_async_verbs() -> None:
    async def scenario() -> None:
        engine = fake_engine(step_ms=1)
        info = await engine.start()
        assert info.model.id == "stepwell/fake"
        kinds = [type(event).__name__ async for event in engine.generate(Request("circle", preview_every_default()))]
        assert kinds[0] == "Queued" and kinds[-1] == "Done"
        endless = engine.generate(Request("circle", SamplingParams(num_inference_steps=1000), id="long"))
        async for event in endless:
            if type(event).__name__ == "Progress":
                await engine.abort("long")
            if isinstance(event, Failed):
                assert event.code == "aborted"
        stats = await engine.control(Stats())
        assert (stats.requests, stats.held_samples) == (0, 0)
        await engine.abort("unknown")
        await engine.close()

    asyncio.run(scenario())


def preview_every_default() -> SamplingParams:
    return SamplingParams(num_inference_steps=3)

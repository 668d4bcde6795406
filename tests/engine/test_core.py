"""The loop under random schedules: every request ends exactly once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepwell.config.schema import EngineOptions
from stepwell.engine.api import Stats
from stepwell.engine.core import EngineCore
from stepwell.engine.fake import FakeWorker
from stepwell.engine.intake import complete
from stepwell.engine.local import LocalEngine
from stepwell.engine.steps import ItemResult, StagePlan, Step, StepResult
from stepwell.errors import EngineClosed, InvalidRequest, QueueFull, StepwellError
from stepwell.generator import open_engine
from stepwell.types import Done, Event, Failed, Frames, Preview, Progress, Request, SamplingParams
from tests.support.server import fake as fake_engine

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
    settle(engine)
    assert not after_the_end
    for asked in requests:
        (end,) = ends[asked.id]
        if isinstance(end, Done):
            assert [o.index for o in end.outputs] == list(range(asked.sampling.num_outputs or 0))
        else:
            assert end.code == "aborted" or "poison" in asked.prompt


def settle(engine: LocalEngine) -> None:
    """Wait until the engine says that nothing is left of any request."""
    core = engine._core
    assert core is not None
    deadline = time.monotonic() + 5
    while (now := core.stats()) and (now.held_samples, now.running_samples, now.queued_samples, now.requests) != (0, 0, 0, 0):
        assert time.monotonic() < deadline, now
        time.sleep(0.001)


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


def test_a_full_queue_says_when_to_come_again() -> None:
    engine = fake_engine(step_ms=2, max_running=1, max_queued=3)
    engine.open()
    list(engine.stream(Request("circle", SamplingParams(num_inference_steps=20))))  # now the pace is known
    with pytest.raises(QueueFull) as caught:
        for _ in range(6):
            engine.submit(Request("circle", SamplingParams(num_inference_steps=500)), lambda _: None)
    assert caught.value.retry_after_s is not None and 0.2 < caught.value.retry_after_s < 20
    engine.shut()


def test_a_queue_bounded_by_time_takes_what_is_soon_done() -> None:
    engine = fake_engine(step_ms=5, max_wait_s=1.0)
    engine.open()
    list(engine.stream(Request("circle", SamplingParams(num_inference_steps=20))))
    engine.submit(Request("circle", SamplingParams(num_inference_steps=1000)), lambda _: None)
    with pytest.raises(QueueFull, match="the queue takes 1 s") as caught:
        engine.submit(Request("circle", SamplingParams(num_inference_steps=1)), lambda _: None)
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0.5
    engine.shut()


def test_no_more_samples_are_under_way_than_allowed() -> None:
    engine = fake_engine(step_ms=1, max_running=3)
    engine.open()
    done = threading.Semaphore(0)
    most = 0

    def sink(event: Event) -> None:
        nonlocal most
        assert engine._core is not None
        stats = engine._core.stats()
        most = max(most, stats.running_samples, stats.held_samples)
        if isinstance(event, Done):
            done.release()

    for _ in range(8):
        engine.submit(Request("circle", SamplingParams(num_inference_steps=5, num_outputs=2)), sink)
    assert all(done.acquire(timeout=20) for _ in range(8))
    assert most == 3
    engine.shut()


def test_a_second_denoiser_counts_on() -> None:
    """Previews, step times and the share of work go on where the first denoiser's stage ended."""

    class TwoDenoisers(FakeWorker):
        def plan(self, request: Request) -> tuple[StagePlan, ...]:
            return tuple(
                StagePlan(name, 2, tokens, True) for name, tokens in (("denoise", 30), ("denoise_late", 10), ("rest", 10))
            )

        def execute(self, step: Step) -> StepResult:
            (sample_id, index), is_last = step.items[0], step.stage == "rest"
            picture = Frames(bytes(3), 1, 1, 1)
            item = ItemResult(sample_id, index == 1, preview=None if is_last else picture, frames=picture if is_last else None)
            return StepResult((item,), 1.0)

    engine = LocalEngine(TwoDenoisers)
    engine.open()
    events = list(engine.stream(Request("x")))
    engine.shut()
    assert [event.step for event in events if isinstance(event, Preview)] == [1, 2, 3, 4]
    shares = [event.share for event in events if isinstance(event, Progress)]
    assert shares == pytest.approx([0, 0.3, 0.6, 0.7, 0.8, 0.9, 1])
    end = events[-1]
    assert isinstance(end, Done) and len(end.outputs[0].denoise_ms) == 4


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


@pytest.mark.parametrize("breaks_on", ["Queued", "Progress", "Done"])
def test_a_sink_that_raises_ends_its_own_request_only(breaks_on: str) -> None:
    engine = fake_engine(step_ms=1)
    engine.open()

    def raises(event: Event) -> None:
        if type(event).__name__ == breaks_on:
            raise ValueError("a bug of the caller")

    engine.submit(Request("circle"), raises)
    *_, last = engine.stream(Request("circle"))
    assert isinstance(last, Done)
    settle(engine)
    engine.shut()


def test_giving_up_while_the_request_is_being_queued_aborts_it() -> None:
    async def scenario() -> None:
        engine = fake_engine(step_ms=300)
        await engine.start()
        first = asyncio.create_task(anext(aiter(engine.generate(Request("circle", SamplingParams(num_inference_steps=2))))))
        await first
        events = engine.generate(Request("circle", SamplingParams(num_inference_steps=1000)))
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0.05)  # the loop is in a step: the request is in the inbox
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.to_thread(settle, engine)
        await engine.close()

    asyncio.run(scenario())


def test_opening_and_closing_from_many_threads() -> None:
    built: list[int] = []

    def build() -> FakeWorker:
        time.sleep(0.05)
        built.append(1)
        return FakeWorker()

    engine = LocalEngine(build)
    openers = [threading.Thread(target=lambda: engine.open()) for _ in range(4)]
    for thread in openers:
        thread.start()
    time.sleep(0.01)
    closer = threading.Thread(target=engine.shut)
    closer.start()
    for thread in [*openers, closer]:
        thread.join(10)
        assert not thread.is_alive()
    assert sum(built) == 1
    with pytest.raises(EngineClosed):
        engine.open()


def test_a_step_that_fails_for_some_is_tried_one_by_one(flux_dev: Path) -> None:
    from stepwell.engine.intake import complete
    from stepwell.engine.steps import NewSample, Step
    from tests.support.driving import worker_of

    worker = worker_of(flux_dev, threads=1)
    asked = complete(
        Request("circle", SamplingParams(width=32, height=32, num_outputs=3, seed=1, max_sequence_length=8)), worker.info
    )
    ids = [f"{asked.id}/{i}" for i in range(3)]
    new = tuple(NewSample(sample_id, asked, i) for i, sample_id in enumerate(ids))
    worker.execute(Step("encode_text", tuple((i, 0) for i in ids), new))
    worker.execute(Step("prepare_latents", tuple((i, 0) for i in ids)))
    worker._states[ids[1]].latents = None
    results = worker.execute(Step("denoise", tuple((i, 0) for i in ids))).items
    assert [result.error is None for result in results] == [True, False, True]


def test_the_async_verbs() -> None:
    async def scenario() -> None:
        engine = fake_engine(step_ms=1)
        info = await engine.start()
        assert info.model.id == "stepwell/fake-image"
        kinds = [type(event).__name__ async for event in engine.generate(Request("circle", preview_every_default()))]
        assert kinds[0] == "Queued" and kinds[-1] == "Done"
        endless = engine.generate(Request("circle", SamplingParams(num_inference_steps=1000), id="long"))
        async for event in endless:
            if type(event).__name__ == "Progress":
                await engine.abort("long")
            if isinstance(event, Failed):
                assert event.code == "aborted"
        await asyncio.to_thread(settle, engine)
        assert (await engine.control(Stats())).steps > 0
        await engine.abort("unknown")
        await engine.close()

    asyncio.run(scenario())


def preview_every_default() -> SamplingParams:
    return SamplingParams(num_inference_steps=3)


def test_the_wait_for_the_step_under_way_counts_as_queued() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(FakeWorker):
        def execute(self, step: Step) -> StepResult:
            begun.set()
            go_on.wait(10)
            return super().execute(step)

    worker = Slow()
    core = EngineCore(worker, max_running=8, max_queued=8)
    thread = threading.Thread(target=core.run, daemon=True)
    thread.start()
    done: queue.SimpleQueue[Event] = queue.SimpleQueue()
    core.submit(complete(Request("circle"), worker.info), lambda _: None)
    assert begun.wait(10)
    core.submit(complete(Request("circle"), worker.info), done.put)
    time.sleep(0.05)
    go_on.set()
    while not isinstance(event := done.get(timeout=10), Done):
        pass
    assert event.outputs[0].timings_ms["queued"] >= 50
    core.close()
    thread.join(10)

"""Sleep and wake of an engine in this process and of one in its own: memory goes, no request is lost, doubled or left waiting."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from stepwell import DiffGenerator
from stepwell.config.hardware import host_memory
from stepwell.config.schema import EngineOptions
from stepwell.engine.api import Engine, Queue, QueueReply, Sleep, SleepReply, Stats, StatsReply, Wake
from stepwell.engine.fake import FakeWorker
from stepwell.engine.local import LocalEngine
from stepwell.engine.remote import RemoteEngine
from stepwell.errors import Asleep, EngineClosed, InvalidRequest, StepwellError, Unavailable
from stepwell.types import Done, Event, Failed, Progress, Request, SamplingParams, TextParams

KINDS = ("local", "remote")


def engine_of(kind: str, step_ms: float = 2, **options: object) -> Engine:
    if kind == "local":
        limits = {"max_running": options.get("max_running_samples", 32)}
        return LocalEngine(lambda: FakeWorker(step_ms), **limits)  # type: ignore[arg-type]
    return RemoteEngine(EngineOptions(model_path=f"stepwell/fake-image?step_ms={step_ms}", **options))  # type: ignore[arg-type]


def asked(prompt: str = "a star", steps: int = 5) -> Request:
    return Request(prompt, SamplingParams(num_inference_steps=steps, seed=3))


async def events_of(engine: Engine, request: Request) -> list[Event]:
    return [event async for event in engine.generate(request)]


async def state_of(engine: Engine) -> str:
    stats = await engine.control(Stats())
    assert isinstance(stats, StatsReply)
    return stats.state


async def tell(engine: Engine, message: Sleep | Wake) -> str:
    reply = await engine.control(message)
    assert isinstance(reply, SleepReply)
    return reply.state


def run(kind: str, test: Callable[[Engine], Awaitable[None]], step_ms: float = 2, **options: object) -> None:
    async def whole() -> None:
        engine = engine_of(kind, step_ms, **options)
        await engine.start()
        try:
            await test(engine)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(whole(), 60))


async def begun(engine: Engine, steps: int) -> asyncio.Task[list[Event]]:
    """A request that is under way."""
    is_begun = asyncio.Event()

    async def follow() -> list[Event]:
        events = []
        async for event in engine.generate(asked(steps=steps)):
            events.append(event)
            if isinstance(event, Progress) and event.stage == "denoise":
                is_begun.set()
        return events

    task = asyncio.create_task(follow())
    await is_begun.wait()
    return task


@pytest.mark.parametrize("kind", KINDS)
def test_asleep_it_refuses_and_awake_it_makes_the_same(kind: str) -> None:
    async def test(engine: Engine) -> None:
        before = (await events_of(engine, asked()))[-1]
        for _ in range(2):
            assert await tell(engine, Sleep()) == "asleep" == await state_of(engine)
        with pytest.raises(Asleep, match="/v1/wake") as refused:
            await events_of(engine, asked())
        assert refused.value.status == 503 and refused.value.retry_after_s
        assert await engine.control(Queue()) == QueueReply((), 0.0)
        await engine.abort("nobody")
        for _ in range(2):
            assert await tell(engine, Wake()) == "awake" == await state_of(engine)
        after = (await events_of(engine, asked()))[-1]
        assert isinstance(before, Done) and isinstance(after, Done)
        assert after.outputs[0].frames == before.outputs[0].frames

    run(kind, test)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_under_way_ends_first_and_what_waits_is_refused(kind: str) -> None:
    async def test(engine: Engine) -> None:
        running = await begun(engine, 30)
        waiting = asyncio.create_task(events_of(engine, asked("waits")))
        await asyncio.sleep(0.05)
        sleeping = asyncio.create_task(tell(engine, Sleep()))
        await asyncio.sleep(0.05)
        assert await state_of(engine) == "drowsy" and not running.done()
        with pytest.raises(Asleep):
            await events_of(engine, asked("comes too late"))
        refused = (await waiting)[-1]
        assert isinstance(refused, Failed) and refused.code == "asleep" and refused.status == 503
        assert await sleeping == "asleep"
        assert isinstance((await running)[-1], Done)

    run(kind, test, step_ms=20, max_running_samples=1)


@pytest.mark.parametrize("kind", KINDS)
def test_abort_waits_for_nobody(kind: str) -> None:
    async def test(engine: Engine) -> None:
        running = await begun(engine, 1000)
        assert await tell(engine, Sleep(abort=True)) == "asleep"
        last = (await running)[-1]
        assert isinstance(last, Failed) and last.code == "asleep"

    run(kind, test, step_ms=20)


@pytest.mark.parametrize("kind", KINDS)
def test_woken_before_it_slept_it_stays_awake(kind: str) -> None:
    async def test(engine: Engine) -> None:
        running = await begun(engine, 20)
        sleeping = [asyncio.create_task(tell(engine, Sleep())) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert await tell(engine, Wake()) == "awake"
        assert await asyncio.gather(*sleeping) == ["awake", "awake"] and not running.done()
        results = await asyncio.gather(running, events_of(engine, asked()))
        assert all(isinstance(events[-1], Done) for events in results)

    run(kind, test, step_ms=20)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_ends_sleep_and_nothing_wakes_it_after(kind: str) -> None:
    async def test(engine: Engine) -> None:
        await tell(engine, Sleep())
        await engine.close()
        for message in (Sleep(), Wake()):
            with pytest.raises(EngineClosed):
                await engine.control(message)
        with pytest.raises(EngineClosed):
            await events_of(engine, asked())

    run(kind, test)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_order_every_request_ends_once(kind: str, seed: int) -> None:
    """Sleep, wake and requests at random moments: each request ends once, and a last wake leaves an engine that works."""
    dice = random.Random(seed)

    async def one(engine: Engine) -> int:
        await asyncio.sleep(dice.random())
        try:
            events = await events_of(engine, asked(steps=dice.randint(1, 30)))
        except Unavailable:
            return 0
        assert [isinstance(event, Done | Failed) for event in events].count(True) == 1 and isinstance(events[-1], Done | Failed)
        return int(isinstance(events[-1], Done))

    async def turn(engine: Engine) -> None:
        await asyncio.sleep(dice.random())
        await engine.control(dice.choice((Sleep(), Wake(), Sleep(abort=True), Wake())))

    async def test(engine: Engine) -> None:
        await asyncio.gather(*(one(engine) for _ in range(15)), *(turn(engine) for _ in range(8)))
        assert await tell(engine, Wake()) == "awake"
        assert isinstance((await events_of(engine, asked()))[-1], Done)
        stats = await engine.control(Stats())
        assert isinstance(stats, StatsReply) and (stats.requests, stats.held_samples) == (0, 0)

    run(kind, test, step_ms=3)


# ------------------------------------------------------------------------------------------------- a process of its own
def remote(test: Callable[[RemoteEngine], Awaitable[None]], **options: object) -> None:
    async def whole(engine: Engine) -> None:
        assert isinstance(engine, RemoteEngine)
        await test(engine)

    run("remote", whole, **options)  # type: ignore[arg-type]


def test_asleep_there_is_no_process() -> None:
    async def test(engine: RemoteEngine) -> None:
        assert engine._child is not None
        first = engine._child.process.pid
        await tell(engine, Sleep())
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        await tell(engine, Wake())
        assert engine._child is not None and engine._child.process.pid != first and engine.restarts == 0

    remote(test)


def test_requests_that_come_while_it_wakes_are_served() -> None:
    async def test(engine: RemoteEngine) -> None:
        await tell(engine, Sleep())
        waking = asyncio.create_task(tell(engine, Wake()))
        await asyncio.sleep(0.01)
        assert await state_of(engine) == "waking"
        assert isinstance((await events_of(engine, asked()))[-1], Done)
        assert await waking == "awake"

    remote(test)


def test_sleep_while_it_wakes_has_the_last_word() -> None:
    async def test(engine: RemoteEngine) -> None:
        await tell(engine, Sleep())
        waking = asyncio.create_task(tell(engine, Wake()))
        await asyncio.sleep(0.01)
        assert await tell(engine, Sleep()) == "asleep"
        await waking
        assert await state_of(engine) == "asleep" and engine._child is None

    remote(test)


def test_a_process_that_dies_while_it_falls_asleep_ends_its_requests_first() -> None:
    async def test(engine: RemoteEngine) -> None:
        running = await begun(engine, 40)
        sleeping = asyncio.create_task(tell(engine, Sleep()))
        await asyncio.sleep(0.05)
        assert engine._child is not None
        os.kill(engine._child.process.pid, signal.SIGKILL)
        assert await sleeping == "asleep"
        assert isinstance((await running)[-1], Done) and engine.restarts == 1

    remote(test, step_ms=20)


def test_a_process_that_dies_while_it_wakes_leaves_it_asleep() -> None:
    async def test(engine: RemoteEngine) -> None:
        await tell(engine, Sleep())
        waking = asyncio.create_task(tell(engine, Wake()))
        waiting = asyncio.create_task(events_of(engine, asked()))
        while engine._child is None:
            await asyncio.sleep(0.005)
        os.kill(engine._child.process.pid, signal.SIGKILL)
        with pytest.raises(StepwellError, match="died while loading"):
            await waking
        refused = (await waiting)[-1]
        assert isinstance(refused, Failed) and refused.code == "unavailable"
        assert await state_of(engine) == "asleep"
        assert await tell(engine, Wake()) == "awake"

    remote(test)


def test_closing_while_it_wakes_leaves_no_process() -> None:
    async def test(engine: RemoteEngine) -> None:
        await tell(engine, Sleep())
        waking = asyncio.create_task(tell(engine, Wake()))
        while engine._child is None:
            await asyncio.sleep(0.005)
        pid = engine._child.process.pid
        await engine.close()
        with pytest.raises(StepwellError):
            await waking
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    remote(test)


# --------------------------------------------------------------------------------------------------- the Python API
def test_the_python_api_lets_go_of_the_model(flux_dev: Path) -> None:
    with DiffGenerator.from_pretrained(str(flux_dev), threads=1) as generator:
        sizes = {"width": 32, "height": 32, "num_inference_steps": 1, "seed": 1, "max_sequence_length": 16}
        before = generator.generate("a star", **sizes)[0].frames
        assert generator._engine._core is not None
        worker = weakref.ref(generator._engine._core._worker)
        denoiser = weakref.ref(generator._engine._core._worker._stages["denoise"].denoiser)  # type: ignore[attr-defined]
        generator.sleep()
        generator.sleep()
        gc.collect()
        assert worker() is None and denoiser() is None, "the model is still held"
        with pytest.raises(Asleep, match=r"DiffGenerator\.wake"):
            generator.generate("a star", **sizes)
        generator.wake()
        generator.wake()
        assert (generator.generate("a star", **sizes)[0].frames == before).all()


def test_a_wake_that_fails_can_be_tried_again() -> None:
    tries = iter((None, InvalidRequest("gone"), None))

    def build() -> FakeWorker:
        error = next(tries)
        if error is not None:
            raise error
        return FakeWorker()

    engine = LocalEngine(build)
    engine.open()
    engine.sleep()
    with pytest.raises(InvalidRequest, match="gone"):
        engine.wake()
    assert engine.state == "asleep"
    assert engine.wake() == "awake"
    engine.shut()


def test_sleep_waits_for_a_load_under_way() -> None:
    go, loading = threading.Event(), threading.Event()

    def build() -> FakeWorker:
        loading.set()
        go.wait(10)
        return FakeWorker()

    engine = LocalEngine(build)
    opening = threading.Thread(target=engine.open)
    opening.start()
    loading.wait(10)
    states: list[str] = []
    sleeping = threading.Thread(target=lambda: states.append(engine.sleep()))
    sleeping.start()
    time.sleep(0.05)
    assert not states
    go.set()
    sleeping.join(10)
    opening.join(10)
    assert states == ["asleep"]
    engine.shut()


def test_memory_is_given_back() -> None:
    """A real model: asleep, nothing of what the engine's process held is held by anybody."""

    async def test() -> None:
        engine = RemoteEngine(EngineOptions(model_path="stepwell/tiny-llada", threads=1))
        await engine.start()
        try:
            stats = await engine.control(Stats())
            assert isinstance(stats, StatsReply) and stats.memory_bytes > 200 * 2**20
            own = host_memory().resident_bytes
            await tell(engine, Sleep())
            asleep = await engine.control(Stats())
            assert isinstance(asleep, StatsReply) and asleep.memory_bytes == 0 and engine._child is None
            assert host_memory().resident_bytes < own + 20 * 2**20
            await tell(engine, Wake())
            last = (await events_of(engine, Request("x", SamplingParams(), text=TextParams(max_tokens=4))))[-1]
            assert isinstance(last, Done)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(test(), 120))

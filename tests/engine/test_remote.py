"""The engine in a process of its own: it may be killed or hang, and no request is lost, doubled or left waiting."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from stepwell.config.schema import EngineOptions
from stepwell.engine.api import Queue, QueueReply, Stats, StatsReply
from stepwell.engine.remote import Phase, RemoteEngine
from stepwell.engine.wire import Submit, pack, unpack
from stepwell.errors import EngineClosed, InvalidRequest, OutOfMemory, StepwellError, Unavailable, WorkerLost, by_code
from stepwell.types import Done, Event, Failed, Frames, Preview, Progress, Queued, Request, SamplingParams


@asynccontextmanager
async def engine(step_ms: float = 2, **options: object) -> AsyncIterator[RemoteEngine]:
    made = RemoteEngine(EngineOptions(model_path=f"stepwell/fake-image?step_ms={step_ms}", **options))  # type: ignore[arg-type]
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def asked(prompt: str = "a red circle", **sampling: object) -> Request:
    return Request(prompt, SamplingParams(**{"num_inference_steps": 5, "seed": 3, **sampling}))  # type: ignore[arg-type]


async def events_of(made: RemoteEngine, request: Request) -> list[Event]:
    return [event async for event in made.generate(request)]


async def result_of(made: RemoteEngine, request: Request) -> Done:
    *_, last = await events_of(made, request)
    if isinstance(last, Failed):
        raise by_code(last.code, last.message, last.param)
    assert isinstance(last, Done)
    return last


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def kill(made: RemoteEngine, with_signal: int = signal.SIGKILL) -> None:
    assert made._child is not None
    with suppress(ProcessLookupError):
        os.kill(made._child.process.pid, with_signal)


def test_messages_survive_the_wire_and_nothing_else_passes() -> None:
    request = Request("ä 円", SamplingParams(seed=2**62), image=Frames(b"\0" * 12, 1, 2, 2), priority=-3)
    again = unpack(pack(Submit(request)))
    assert isinstance(again, Submit) and again.request == request
    for data in (b"", b"\x93", pack(Submit(request))[:-3], b"\x92\xa4exec\xc0", b"\x92\xa6Submit\x80", b"cos\nsystem\n"):
        with pytest.raises(ValueError, match="not a message"):
            unpack(data)


def test_events_come_as_from_an_engine_in_this_process() -> None:
    async def test() -> None:
        async with engine() as made:
            events = await events_of(made, Request("a star", asked().sampling, preview_every=2))
            assert isinstance(events[0], Queued) and isinstance(events[-1], Done)
            assert [e.step for e in events if isinstance(e, Progress) and e.stage == "denoise"] == [1, 2, 3, 4, 5]
            assert [e.step for e in events if isinstance(e, Preview)] == [2, 4]
            assert events[-1].outputs[0].seed == 3
            stats, queue = await made.control(Stats()), await made.control(Queue())
            assert isinstance(stats, StatsReply) and stats.requests == 0 and stats.tokens > 0 and stats.memory_bytes > 2**20
            assert isinstance(queue, QueueReply) and not queue.entries and queue.tokens_per_s > 0

    run(test)


def test_refusals_and_failures_keep_their_types() -> None:
    async def test() -> None:
        async with engine(max_queued_samples=2, max_running_samples=1) as made:
            with pytest.raises(InvalidRequest, match="width = 17"):
                await events_of(made, asked(width=17))
            with pytest.raises(OutOfMemory):
                await result_of(made, asked("gluttony"))
            with pytest.raises(InvalidRequest, match="the queue holds 2"):
                await events_of(made, asked(num_outputs=3))
            assert (await result_of(made, asked())).outputs

    run(test)


def test_a_model_that_can_not_be_loaded_says_why() -> None:
    async def test() -> None:
        for path, words in (("/nowhere", "/nowhere"), ("stepwell/fake-image?step_ms=no", "step_ms=NUMBER")):
            with pytest.raises(StepwellError, match=words.replace("?", r"\?")):
                await RemoteEngine(EngineOptions(model_path=path)).start()

    run(test)


def test_abort_and_leaving_the_stream() -> None:
    async def test() -> None:
        async with engine(step_ms=20) as made:
            first, second = asked(num_inference_steps=500), asked(num_inference_steps=500)

            async def watch(request: Request) -> Event | None:
                last = None
                async for event in made.generate(request):
                    last = event
                return last

            watching = asyncio.create_task(watch(first))
            leaving = asyncio.create_task(watch(second))
            await asyncio.sleep(0.3)
            began = time.monotonic()
            await made.abort(first.id)
            leaving.cancel()
            ended = await watching
            assert isinstance(ended, Failed) and ended.code == "aborted" and time.monotonic() - began < 0.5
            while (stats := await made.control(Stats())) and isinstance(stats, StatsReply) and stats.held_samples:
                assert time.monotonic() - began < 2
                await asyncio.sleep(0.01)
            await made.abort("never heard of it")

    run(test)


@pytest.mark.parametrize("kills", [10, pytest.param(25, marks=pytest.mark.long)])
def test_a_killed_process_takes_nobody_with_it(kills: int) -> None:
    """Kills at random moments under load: every request ends in its own picture."""

    async def test() -> None:
        rng = random.Random(0)
        async with engine(step_ms=3) as made:
            quiet = {seed: (await result_of(made, asked(seed=seed))).outputs[0].frames for seed in range(6)}

            async def client(number: int) -> None:
                for turn in range(20):
                    seed = (number + turn) % 6
                    try:
                        done = await result_of(made, asked(f"number {number} turn {turn}", seed=seed))
                    except WorkerLost:  # it was under way in two deaths, which is the promise's bound
                        lost.append(number)
                        continue
                    assert done.outputs[0].frames == quiet[seed]

            lost: list[int] = []
            clients = [asyncio.create_task(client(number)) for number in range(4)]
            for _ in range(kills):
                while made.phase is not Phase.READY:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(rng.uniform(0, 0.1))
                kill(made)
                began = time.monotonic()
                while made.phase is Phase.READY and made._child is not None and made._child.process.returncode is None:
                    assert time.monotonic() - began < 2, "the death was not noticed"
                    await asyncio.sleep(0.01)
            await asyncio.gather(*clients)
            assert made.restarts >= 0.8 * kills and not made._flights

    run(test)


def test_a_request_that_kills_twice_is_refused_and_its_neighbours_live() -> None:
    async def test() -> None:
        async with engine(step_ms=5) as made:
            waiting = [asyncio.create_task(result_of(made, asked(f"a star {n}", num_inference_steps=3))) for n in range(3)]
            with pytest.raises(WorkerLost, match="twice"):
                await result_of(made, asked("crash"))
            deaths = made.restarts
            with pytest.raises(WorkerLost, match="refused for an hour"):
                await result_of(made, asked("crash"))
            for one in waiting:
                with suppress(WorkerLost):
                    await one
            assert (await result_of(made, asked())).outputs
            assert deaths <= 2 and made.restarts == deaths

    run(test)


def test_a_stopped_process_keeps_no_question_waiting() -> None:
    async def test() -> None:
        async with engine() as made:
            await result_of(made, asked())
            kill(made, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(Unavailable, match="does not answer"):
                await made.control(Stats())
            assert time.monotonic() - began < 5
            kill(made, signal.SIGCONT)
            assert isinstance(await made.control(Queue()), QueueReply)  # and no late answer is taken for another's

    run(test)


@pytest.mark.parametrize("how", ["the step hangs", "the process is stopped"])
def test_a_hang_is_noticed_and_the_request_runs_again_or_fails(how: str) -> None:
    async def test() -> None:
        async with engine(step_ms=2, hang_seconds=1.5) as made:
            await result_of(made, asked())
            if how == "the step hangs":
                with pytest.raises(WorkerLost):
                    await result_of(made, asked("hang"))
                assert made.restarts == 2
            else:
                running = asyncio.create_task(result_of(made, asked(num_inference_steps=300)))
                await asyncio.sleep(0.2)
                kill(made, signal.SIGSTOP)
                assert (await running).outputs
                assert made.restarts == 1
            assert (await result_of(made, asked())).outputs

    run(test)


def test_closing_ends_everybody_and_leaves_nothing() -> None:
    async def test() -> None:
        made = RemoteEngine(EngineOptions(model_path="stepwell/fake-image?step_ms=20"))
        with pytest.raises(EngineClosed, match="not been started"):
            await result_of(made, asked())
        await made.start()
        assert made._child is not None
        pid, folder = made._child.process.pid, made._folder
        running = asyncio.create_task(events_of(made, asked(num_inference_steps=500)))
        await asyncio.sleep(0.1)
        await made.close()
        await made.close()
        last = (await running)[-1]
        assert isinstance(last, Failed) and last.code == "engine_closed"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert not os.path.exists(folder)
        with pytest.raises(EngineClosed):
            await result_of(made, asked())

    run(test)


def test_an_engine_that_can_not_come_back_fails_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell.engine.remote.RESTART_S", (0, 0.05))

    async def test() -> None:
        async with engine(step_ms=5) as made:
            made._options = EngineOptions(model_path="stepwell/fake-image", profile=True)  # refused
            running = asyncio.create_task(result_of(made, asked(num_inference_steps=500)))
            await asyncio.sleep(0.1)
            kill(made)
            with pytest.raises(Unavailable, match="can't be brought back"):
                await running
            with pytest.raises(Unavailable):
                await result_of(made, asked())
            made._options = EngineOptions(model_path="stepwell/fake-image")
            while made.phase is not Phase.READY:
                await asyncio.sleep(0.05)
            assert (await result_of(made, asked())).outputs

    run(test)

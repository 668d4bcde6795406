"""`kill -9`, of the engine's process and of the whole server: what was under way goes on from its last checkpoint, bit for bit,
pictures and videos.

`-m long` kills twenty times.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import signal
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from stepwell.config.schema import EngineOptions
from stepwell.engine.checkpoint_files import steps_saved
from stepwell.engine.remote import RemoteEngine
from stepwell.generator import open_engine
from stepwell.media.images import decode_image
from stepwell.media.video import thumbnail
from stepwell.serve.jobs import Job, JobStore, new_job_id
from stepwell.serve.records import to_record
from stepwell.types import Done, Frames, Progress, Request, SamplingParams, Task, replace
from tests.support.command import Command, until

MODEL, VIDEO_MODEL = "stepwell/tiny-flux", "stepwell/tiny-wan"
FIXED = {"threads": 1, "attention_backend": "torch_sdpa", "linear_backend": "torch"}  # auto measures, in every life anew
CACHE = {"cache_method": "dbcache", "cache_dit_taylorseer": True}


def request(steps: int) -> Request:
    size = {"width": 64, "height": 64, "num_frames": 1, "fps": 1}
    rest = {"guidance_scale": 0.0, "true_cfg_scale": 2.0, "negative_prompt": "a green star", "max_sequence_length": 64}
    sampling = SamplingParams(num_inference_steps=steps, num_outputs=1, seed=9, **size, **rest)  # type: ignore[arg-type]
    return Request("a red circle", sampling, Task.TEXT_TO_IMAGE)


def video(steps: int) -> Request:
    """UniPC remembers earlier steps, so a checkpoint holds more than the latents."""
    size = {"width": 64, "height": 48, "num_frames": 9, "fps": 8, "max_sequence_length": 512}
    rest = {"guidance_scale": 3.0, "true_cfg_scale": 1.0, "negative_prompt": "a green square"}
    sampling = SamplingParams(num_inference_steps=steps, num_outputs=1, seed=9, **size, **rest)  # type: ignore[arg-type]
    return Request("a red circle moving right", sampling, Task.TEXT_TO_VIDEO, model=VIDEO_MODEL)


async def lives(folder: Path, kills: int, interval_s: float, asked: Request) -> tuple[Done, list[tuple[int, list[int]]]]:
    """A request whose process is killed so often, at random steps: its end, and of every life of the process the steps that
    were saved before it and those that it took."""
    rng = random.Random(4)
    options = EngineOptions.model_validate(
        {
            "model_path": asked.model or MODEL,
            "checkpoint_path": str(folder),
            "checkpoint_interval_s": interval_s,
            **FIXED,
            **CACHE,
        }
    )
    engine = RemoteEngine(options)
    await engine.start()
    told: list[tuple[int, list[int]]] = [(0, [])]
    saved, wait = 0, rng.randint(1, 8)
    try:
        async with aclosing(engine.generate(asked)) as events:
            async for event in events:
                if isinstance(event, Done):
                    assert steps_saved(folder, asked) or interval_s, "erased before whoever asked was done with the result"
                    return event, told
                if not (isinstance(event, Progress) and event.stage == "denoise"):
                    continue
                if len(told) <= engine.restarts:  # the first step of another life
                    told.append((saved, []))
                    wait = rng.randint(1, 8)
                told[-1][1].append(event.step)
                is_alive = engine._child is not None and engine._child.process.returncode is None
                if len(told) <= kills and is_alive and len(told[-1][1]) >= wait and steps_saved(folder, asked) > told[-1][0]:
                    assert engine._child is not None
                    os.kill(engine._child.process.pid, signal.SIGKILL)
                    await engine._child.process.wait()
                    saved = steps_saved(folder, asked)
    finally:
        await engine.close()
    raise AssertionError("the request ended without a result")


def uninterrupted(asked: Request) -> Done:
    engine = open_engine(EngineOptions.model_validate({"model_path": asked.model or MODEL, **FIXED, **CACHE}))
    engine.open()
    *_, last = engine.stream(asked)
    engine.shut()
    assert isinstance(last, Done)
    return last


@pytest.mark.parametrize(
    ("make", "kills", "interval_s"),
    [
        pytest.param(request, 1, 0.0, id="picture"),  # `test_a_server_killed_in_mid_job_goes_on_with_it` has three lives
        pytest.param(video, 2, 0.0, id="video"),
        *(
            pytest.param(make, 20, interval_s, id=f"{name}-20-{interval_s}", marks=pytest.mark.long)
            for make, name in ((request, "picture"), (video, "video"))
            for interval_s in (0.0, 0.03)
        ),
    ],
)
def test_an_engine_killed_over_and_over_ends_in_the_same_result(
    tmp_path: Path, make: Callable[[int], Request], kills: int, interval_s: float
) -> None:
    asked = make((40 if interval_s else 12) * (kills + 1))

    async def test() -> None:
        done, told = await lives(tmp_path, kills, interval_s, asked)
        whole = uninterrupted(asked)
        assert done.outputs[0].frames == whole.outputs[0].frames and done.outputs[0].cache == whole.outputs[0].cache
        print("\nsaved before, and taken, in each life:", [(saved, f"{steps[0]}…{steps[-1]}") for saved, steps in told])
        assert len(told) == kills + 1
        for saved, steps in told:
            assert steps == list(range(saved + 1, steps[-1] + 1)), "it did not go on right behind what was saved"
        assert told[-1][1][-1] == asked.sampling.num_inference_steps and not list(tmp_path.glob("*.*"))

    asyncio.run(asyncio.wait_for(test(), 900))


def test_a_server_killed_in_mid_job_goes_on_with_it(tmp_path: Path) -> None:
    """Killed once, and once asked to stop with less time than the job needs."""
    asked = replace(request(steps=60), id=new_job_id())
    flags = ("--checkpoint-interval-s", "0", "--drain-seconds", "0.1", "--threads", "1")
    with Command(MODEL, tmp_path, *flags, "--attention-backend", "torch_sdpa", "--linear-backend", "torch") as server:
        promise(server, asked)
        folder, saved = server.data / "checkpoints", [0]
        for stop in (server.kill, server.stop):
            server.begin()
            until(lambda: steps_saved(folder, asked) > saved[-1] + 3, 60, "a few steps are saved")
            stop()
            until(lambda: not server.engines(), 5, "the engine is gone")
            saved.append(steps_saved(folder, asked))
        server.start()
        until(lambda: server.health().get("jobs") == 0, 60, "the job has ended")
        taken = server.metric(f'stepwell_batch_samples_sum{{model="{MODEL}",stage="denoise"}}')
        print(f"\nsaved before each life: {saved}; the last one took {taken:.0f} of 60 steps")
        assert saved[0] < saved[1] < saved[2] and taken == 60 - saved[2] and not list(folder.iterdir())
        made = server.http.get(f"/v1/videos/{asked.id}/content", params={"variant": "thumbnail"})
        assert made.status_code == 200 and made.content == thumbnail(picture(server, asked))
        assert server.stop() == 0 and not server.complaints()


def promise(server: Command, asked: Request) -> None:
    """Put a job into the store, as if it had been answered for; the bundled model makes pictures, which are no jobs otherwise."""
    server.data.mkdir()
    store = JobStore(server.data / "jobs.sqlite")
    store.create(Job(asked.id, "video", to_record(asked, MODEL, None, ""))).result()
    store.close()


def picture(server: Command, asked: Request) -> Frames:
    """The same, made without a break."""
    s = asked.sampling
    names = ("seed", "num_inference_steps", "true_cfg_scale", "guidance_scale", "negative_prompt", "max_sequence_length")
    body = {name: getattr(s, name) for name in names}
    wanted = {"prompt": asked.prompt, "size": f"{s.width}x{s.height}", "response_format": "b64_json", **body}
    answer = server.http.post("/v1/images/generations", json=wanted).json()
    return decode_image(base64.b64decode(answer["data"][0]["b64_json"]))

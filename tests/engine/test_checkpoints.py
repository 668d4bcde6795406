"""Saving samples between two steps: what is kept where, for how long, and what becomes of what is damaged or another's."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from stepwell import DiffGenerator
from stepwell.config.schema import EngineOptions
from stepwell.engine.checkpoint_files import path_of, steps_saved, write
from stepwell.engine.local import LocalEngine
from stepwell.engine.remote import Phase, RemoteEngine
from stepwell.engine.scheduler import Scheduler
from stepwell.engine.steps import StagePlan
from stepwell.errors import InvalidRequest
from stepwell.generator import open_engine
from stepwell.types import Done, Event, Failed, Frames, Preview, Progress, Request, SamplingParams, replace

OPTIONS = {"threads": 1, "attention_backend": "torch_sdpa", "linear_backend": "torch"}
STEPS = 8
WANTED = SamplingParams(width=32, height=32, num_inference_steps=STEPS, num_outputs=1, seed=5, max_sequence_length=16)
ASKED = Request("a red circle", WANTED, id="../../mine")


DIE = """
import json, os, signal, sys
from stepwell import DiffGenerator

def die(event):
    if getattr(event, "stage", None) == "denoise" and event.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)

options, sampling = json.loads(sys.argv[3])
saving = DiffGenerator.from_pretrained(sys.argv[1], checkpoint_path=sys.argv[2], checkpoint_interval_s=0, **options)
saving.generate(["a star"] * 2, on_event=die, **sampling)
"""  # a call that dies in the middle


def opened(model: Path, folder: Path | None, **options: object) -> LocalEngine:
    place = {} if folder is None else {"checkpoint_path": str(folder), "checkpoint_interval_s": 0}
    engine = open_engine(EngineOptions.model_validate({"model_path": str(model), **place, **OPTIONS, **options}))
    engine.open()
    return engine


def run(engine: LocalEngine, asked: Request = ASKED) -> list[Event]:
    return list(engine.stream(asked))


def cut(engine: LocalEngine, asked: Request = ASKED, at: int = 3, *, aborts: bool = False) -> list[Event]:
    """The same, but once `at` denoising steps are taken, and before the next one, the engine is shut, or the request aborted."""
    events: list[Event] = []

    def sink(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and (event.stage, event.step) == ("denoise", at):
            if aborts:
                engine.cancel(asked.id)
            else:
                engine.shut()

    engine.submit(asked, sink)
    while not (events and isinstance(events[-1], Done | Failed)):
        time.sleep(0.002)
    return events


def steps_of(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, Progress) and event.stage == "denoise"]


def frames_of(events: list[Event]) -> Frames:
    done = events[-1]
    assert isinstance(done, Done), done
    return done.outputs[0].frames


@pytest.fixture(scope="module")
def whole(flux_dev: Path) -> Frames:
    """What an engine that saves nothing makes of it."""
    engine = opened(flux_dev, None)
    frames = frames_of(run(engine))
    engine.shut()
    return frames


@pytest.fixture
def file(flux_dev: Path, tmp_path: Path) -> Path:
    """The checkpoint of an engine that was closed after three steps, alone in its folder."""
    assert steps_of(cut(opened(flux_dev, tmp_path / "saved"))) == [1, 2, 3]
    (file,) = (tmp_path / "saved").iterdir()
    return file


# ------------------------------------------------------------------------------------------------------- where, and how long
def test_it_is_for_its_owner_alone_under_a_name_nobody_chooses(file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert file == path_of(file.parent, f"{ASKED.id}/0") and file.stem.isalnum()
    content = file.read_bytes()
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert (about["stage"], about["step"]) == ("denoise", "3") and steps_saved(file.parent, ASKED) == 3


def test_progress_and_previews_go_on_where_they_were(flux_dev: Path, tmp_path: Path, whole: Frames) -> None:
    asked = replace(ASKED, preview_every=2)
    plain = opened(flux_dev, None)
    expected = [event for event in run(plain, asked) if isinstance(event, Preview)]
    plain.shut()
    before = cut(opened(flux_dev, tmp_path), asked)
    engine = opened(flux_dev, tmp_path)
    after = run(engine, asked)
    engine.shut()
    assert steps_of(before) + steps_of(after) == list(range(1, STEPS + 1)) and frames_of(after) == whole
    assert [event for event in before + after if isinstance(event, Preview)] == expected
    assert [(e.stage, e.step, e.total) for e in after if isinstance(e, Progress)][2:4] == [
        ("prepare_latents", 1, 1),
        ("denoise", 4, STEPS),
    ]


def test_one_saved_after_its_last_step_is_only_decoded(flux_dev: Path, tmp_path: Path, whole: Frames) -> None:
    cut(opened(flux_dev, tmp_path), at=STEPS)
    engine = opened(flux_dev, tmp_path)
    events = run(engine)
    engine.shut()
    assert steps_of(events) == [] and frames_of(events) == whole


@pytest.mark.parametrize("how", ["done", "aborted", "failed"])
def test_it_goes_when_its_request_is_over(flux_dev: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(flux_dev, tmp_path)
    asked = replace(ASKED, sampling=replace(WANTED, num_outputs=2))
    if how == "failed":
        assert engine._core is not None
        monkeypatch.setattr(engine._core._worker._stages["decode"], "run", lambda items: 1 / 0)  # type: ignore[attr-defined]
    if how == "done":
        for event in engine.stream(asked):
            assert not isinstance(event, Done) or len(list(tmp_path.iterdir())) == 2, "not before it was taken"
    else:
        events = cut(engine, asked, aborts=True) if how == "aborted" else run(engine, asked)
        assert isinstance(events[-1], Failed)
    assert not list(tmp_path.iterdir())
    engine.shut()


def test_one_that_was_aborted_before_its_turn_is_kept(flux_dev: Path, file: Path) -> None:
    """As a server does that is asked to stop: its jobs wait for the next start."""
    engine = opened(flux_dev, file.parent, max_running_samples=1)
    long = replace(ASKED, id="another", sampling=replace(WANTED, num_inference_steps=500))
    ahead = engine.stream(replace(long, priority=1))
    next(ahead)
    waiting = engine.stream(ASKED)
    next(waiting)
    waiting.close()  # type: ignore[attr-defined]
    ahead.close()  # type: ignore[attr-defined]
    engine.shut()
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("interval", "files"), [(0, 1), (1e9, 0), (-1, 0)])
def test_the_interval_is_of_work(flux_dev: Path, tmp_path: Path, interval: float, files: int) -> None:
    cut(opened(flux_dev, tmp_path, checkpoint_interval_s=interval))
    assert len(list(tmp_path.iterdir())) == files


def test_only_so_many_seconds_of_work_are_lost(flux_dev: Path, tmp_path: Path) -> None:
    engine = opened(flux_dev, tmp_path, checkpoint_interval_s=0.02)
    assert engine._core is not None
    saved: list[int] = []
    took_s: list[float] = [0.0]
    pace = engine._core.pace

    def sink(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise":
            saved.append(steps_saved(tmp_path, ASKED))
            took_s.append(next(tally for (_, stage), tally in pace.seconds.items() if stage == "denoise").total)
            if event.step == 60:
                engine.shut()

    engine.submit(replace(ASKED, sampling=replace(WANTED, num_inference_steps=200)), sink)
    deadline = time.monotonic() + 60
    while len(saved) < 60:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lost = [took_s[step] - took_s[kept] for step, kept in enumerate(saved, start=1)]
    assert len(set(saved)) > 2 and saved == sorted(saved)
    longest = max(b - a for a, b in pairwise(took_s))  # the pace sees what the worker does not: a busy machine, the writing
    assert all(s < 0.02 + longest for s, kept in zip(lost, saved, strict=True) if kept), "more was unsaved than was asked for"


def test_what_nobody_came_back_for_goes_after_a_day_and_nothing_else(flux_dev: Path, file: Path) -> None:
    half, foreign = file.with_suffix(".partial-1"), file.with_name("thesis.safetensors")
    for each in (half, foreign):
        each.write_bytes(b"x")
    for each in (file, half, foreign):
        os.utime(each, (time.time() - 90_000,) * 2)
    opened(flux_dev, file.parent).shut()
    assert list(file.parent.iterdir()) == [foreign]


# ------------------------------------------------------------------------------------------------- another's, or damaged
ANEW = list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a red circlE"},
        {"seed": 6},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 9},
        {"dit_precision": "bf16"},
        {"vae_precision": "bf16"},
        {"quantization": "int8_weight_only"},
        {"attention_backend": "blocked"},
        {"linear_backend": "packed"},
        {"version": "0.0.1"},
        {"files": "touched"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_of_anything_else_is_erased(
    flux_dev: Path, file: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, value), options, asked = next(iter(change.items())), dict[str, object](), ASKED
    if name == "version":
        monkeypatch.setattr("stepwell.engine.checkpoints.version", lambda name: value)
    elif name == "files":
        weights = next((flux_dev / "transformer").glob("*.safetensors"))
        os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 1))
    elif name == "prompt":
        asked = replace(ASKED, prompt=str(value))
    elif name in EngineOptions.model_fields:
        options = change
    else:
        asked = replace(ASKED, sampling=replace(WANTED, **change))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        engine = opened(flux_dev, file.parent, **options)
        events = cut(engine, asked, at=1)
    assert steps_of(events) == [1] and "made of another request, or by another model" in caplog.text
    assert steps_saved(file.parent, asked) == 1


def test_options_that_change_no_bit_leave_it_of_use(flux_dev: Path, file: Path, whole: Frames) -> None:
    engine = opened(flux_dev, file.parent, max_batch_tokens=77, max_queued_samples=3, prompt_cache_mb=0)
    events = run(engine, replace(ASKED, priority=3, preview_every=5))
    engine.shut()
    assert steps_of(events) == ANEW[3:] and frames_of(events) == whole


def test_damage_is_noticed_wherever_it_is(flux_dev: Path, file: Path, whole: Frames, caplog: pytest.LogCaptureFixture) -> None:
    """Bits turned over, ends cut off, and what was never a checkpoint: the sample starts anew, with a warning."""
    good, rng = file.read_bytes(), random.Random(0)
    bad = [good[:length] for length in (0, 7, 8, 9, 100, len(good) // 2, len(good) - 1)]
    for _ in range(40):
        place = rng.choice([rng.randrange(0, 900), rng.randrange(len(good))])
        bad.append(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1 :])
    bad += [b"\xff" * 1000, good + b"\0", b"\x02\0\0\0\0\0\0\0{}"]
    engine = opened(flux_dev, file.parent)
    for content in bad:
        file.write_bytes(content)
        caplog.clear()
        events = run(engine)
        assert steps_of(events) == ANEW and frames_of(events) == whole
        assert "is of no use, it starts anew" in caplog.text and not file.exists()
    file.write_bytes(good)
    assert steps_of(run(engine)) == ANEW[3:]
    engine.shut()


def test_a_full_disk_is_not_the_requests_trouble(
    flux_dev: Path, file: Path, whole: Frames, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**6))

    def fill_up(descriptor: int, content: memoryview) -> int:
        if next(calls) % 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, content[: len(content) // 2])

    written = os.write
    before = file.read_bytes()
    engine = opened(flux_dev, file.parent)
    monkeypatch.setattr("stepwell.engine.checkpoint_files.os.write", fill_up)
    assert steps_of(cut(engine, at=6)) == [4, 5, 6]
    assert "no checkpoint of" in caplog.text and "No space left" in caplog.text
    assert list(file.parent.iterdir()) == [file] and file.read_bytes() == before, "the last good one was harmed"
    engine = opened(flux_dev, file.parent)
    assert frames_of(run(engine)) == whole
    engine.shut()


def test_a_folder_that_can_not_be_is_refused_in_one_line(flux_dev: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidRequest, match="checkpoint_path = .*can't be kept there") as caught:
        DiffGenerator.from_pretrained(str(flux_dev), checkpoint_path=str(tmp_path / "file" / "below"))
    assert caught.value.param == "checkpoint_path"


def test_an_interval_without_a_folder_is_said_not_to_apply(flux_dev: Path, caplog: pytest.LogCaptureFixture) -> None:
    DiffGenerator.from_pretrained(str(flux_dev), checkpoint_interval_s=5).close()
    assert "checkpoint_interval_s does not apply" in caplog.text


def test_the_same_call_goes_on_where_one_that_was_killed_was(flux_dev: Path, tmp_path: Path) -> None:
    """`stepwell generate` and DiffGenerator: two prompts, of which the process dies; then the same again."""
    sampling = {"width": 32, "height": 32, "num_inference_steps": 30, "seed": 3, "max_sequence_length": 16}
    with DiffGenerator.from_pretrained(str(flux_dev), **OPTIONS) as plain:
        expected = [made.frames.tobytes() for made in plain.generate(["a star"] * 2, **sampling)]
    dying = subprocess.run([sys.executable, "-c", DIE, str(flux_dev), str(tmp_path), json.dumps([OPTIONS, sampling])])
    assert dying.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with DiffGenerator.from_pretrained(str(flux_dev), checkpoint_path=str(tmp_path), **OPTIONS) as again:
        made = again.generate(["a star"] * 2, **sampling)
    assert [one.frames.tobytes() for one in made] == expected and max(len(one.denoise_ms) for one in made) <= 21
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- those who schedule and watch
def test_work_that_is_done_counts_as_done() -> None:
    plan = (StagePlan("encode", 1, 10, True), StagePlan("denoise", 8, 100, True), StagePlan("decode", 1, 50, True))
    scheduler = Scheduler({"": 100})
    for name in ("new", "old"):
        scheduler.add(replace(ASKED, id=name), plan)
    scheduler.resume("old/0", {"denoise": 5})
    assert scheduler.tokens_left() == 860 + 360
    assert [entry.request_id for entry in scheduler.overview()] == ["old", "new"]
    order = []
    while step := scheduler.schedule():
        for sample_id, index in step.items:
            order.append((sample_id, step.stage, index))
            stage = scheduler.position(sample_id)
            scheduler.advance(sample_id, stage_is_done=index + 1 == stage.steps)
    assert [(stage, index) for name, stage, index in order if name == "old/0"] == [
        ("encode", 0), ("denoise", 5), ("denoise", 6), ("denoise", 7), ("decode", 0)
    ]  # fmt: skip
    assert scheduler.tokens_left() == 0


@pytest.mark.parametrize("progress", [True, False])
def test_deaths_count_only_where_nothing_was_saved_between_them(tmp_path: Path, progress: bool) -> None:
    """The process is a fake, which saves nothing; what would have been saved is put there."""

    async def test() -> None:
        options = EngineOptions(model_path="stepwell/fake-image?step_ms=20", checkpoint_path=str(tmp_path))
        engine = RemoteEngine(options)
        await engine.start()
        deaths, last = 0, None
        async for event in engine.generate(replace(ASKED, sampling=replace(WANTED, num_inference_steps=40))):
            last = event
            if isinstance(event, Progress) and event.step == 2 and deaths < 5 and engine.phase is Phase.READY:
                deaths += 1
                about = json.dumps({"__metadata__": {"steps_in_all": str(deaths if progress else 1)}}).encode()
                write(path_of(tmp_path, f"{ASKED.id}/0"), len(about).to_bytes(8, "little") + about)
                assert engine._child is not None
                os.kill(engine._child.process.pid, signal.SIGKILL)
        if progress:
            assert isinstance(last, Done) and deaths == 5
        else:
            assert isinstance(last, Failed) and last.code == "worker_lost" and deaths == 2
            assert not list(tmp_path.iterdir()), "nobody comes back for it"
        await engine.close()

    asyncio.run(asyncio.wait_for(test(), 60))

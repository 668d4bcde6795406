"""Several processes that run one model: the same pictures, and an end to all of them together."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stepwell.cli.main import main
from stepwell.config.load import Place, validate
from stepwell.config.schema import EngineOptions
from stepwell.engine.api import Stats
from stepwell.engine.local import LocalEngine
from stepwell.engine.ranks import _meet
from stepwell.engine.remote import RemoteEngine
from stepwell.engine.steps import StepExecutor
from stepwell.errors import EngineClosed, Unsupported, WeightsError, WorkerLost
from stepwell.generator import DiffGenerator, open_engine
from stepwell.models import hunyuan_video, wan
from stepwell.ops.packing import Lane
from stepwell.parallel.ranks import Agreed, Ranks
from stepwell.parallel.team import Team
from stepwell.types import Done, Event, Failed, Frames, Progress, Request, SamplingParams
from stepwell.weights.hub import locate
from tests.support.ranks import Spoiled, ranked_engine
from tests.support.repositories import hunyuan_repository, wan_repository

WAN = "stepwell/tiny-wan"
GUIDED = SamplingParams(width=64, height=64, num_frames=9, num_inference_steps=4, guidance_scale=3.0, seed=5)


def ranks_of(size: int) -> list[Ranks]:
    """On one thread each they may be used at the same time."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    options = validate(EngineOptions, {"num_gpus": size, "threads": 1})

    def meet(rank: int) -> Ranks:
        place = Place(rank, size, rank, size, "127.0.0.1", store.port, has_store=True)
        return _meet(TCPStore("127.0.0.1", store.port, is_master=False), "life", place, options)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(meet, range(size)))


def on_all(ranks: list[Ranks], work: Any) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


# --------------------------------------------------------------------------------------------------------- how they talk
def test_ranks_say_and_exchange() -> None:
    ranks = ranks_of(3)
    assert on_all(ranks, lambda r: r.first(f"of {r.rank}".encode())) == [b"of 0"] * 3
    assert on_all(ranks, lambda r: r.every(b"x" * r.rank)) == [[b"", b"x", b"xx"]] * 3
    lengths, teams = [2, 3, 1, 4], [2, 0, 2, 0]  # rank 1 has nothing to do
    lanes = [Lane(None, 1, 0, (1, 1, length), team=team) for length, team in zip(lengths, teams, strict=True)]
    rows = torch.randn(10, 5).bfloat16()
    parts = rows.split(lengths)

    def exchange(r: Ranks) -> list[torch.Tensor]:
        own = [part for part, lane in zip(parts, lanes, strict=True) if r.is_mine(lane)]
        return r.exchange(torch.cat(own) if own else rows[:0], lanes)

    for got in on_all(ranks, exchange):
        assert all(torch.equal(a, b) for a, b in zip(got, parts, strict=True))


def test_an_error_of_one_is_everybodys_and_they_go_on() -> None:
    ranks = ranks_of(2)

    def inner(r: Ranks) -> int:
        if r.rank == 1:
            raise MemoryError("too much")
        return r.rank

    def outer(r: Ranks) -> str:
        try:
            r.together(lambda: r.together(lambda: inner(r)) + 1)
        except Agreed as error:
            return f"{type(error.error).__name__}: {error.error}"
        return "fine"

    assert on_all(ranks, outer) == ["StepFailed: rank 1 of 2: MemoryError: too much", "MemoryError: too much"]
    assert on_all(ranks, lambda r: r.together(lambda: r.rank)) == [0, 1]


def test_work_is_spread_evenly() -> None:
    ranks = Ranks(0, 2, splits_guidance=True)
    assert [ranks.team_of(seed, branch, 2) for seed in (7, 8) for branch in (0, 1)] == [0, 1, 0, 1]
    four = Ranks(0, 4, splits_guidance=True)
    assert sorted(four.team_of(seed, branch, 2) for seed in (7, 8) for branch in (0, 1)) == [0, 1, 2, 3]
    teams = Ranks(0, 4, splits_guidance=True, team=Team(ulysses=2))
    assert [teams.team_of(seed, branch, 2) for seed in (7, 8) for branch in (0, 1)] == [0, 1, 0, 1]
    whole = Ranks(0, 2)
    assert [whole.team_of(seed, branch, 2) for seed in (7, 8) for branch in (0, 1)] == [1, 1, 0, 0]


# ---------------------------------------------------------------------------------------------------------- what they make
def test_two_processes_make_what_one_makes() -> None:
    ask: dict[str, Any] = {"prompt": "a red circle moving right", "num_frames": 9, "num_inference_steps": 6, "seed": 3,
                           "guidance_scale": 3.0, "num_outputs_per_prompt": 2}  # fmt: skip
    cache = {"cache_method": "first_block", "cache_dit_rdt": 0.3, "cache_dit_warmup": 1, "threads": 1}
    with DiffGenerator.from_pretrained(WAN, **cache) as alone:
        one = alone.generate(**ask)
    with DiffGenerator.from_pretrained(WAN, num_gpus=2, enable_cfg_parallel=True, warmup_sizes=["64x64"], **cache) as several:
        assert several.model.num_gpus == 2
        two = several.generate(**ask)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(one, two, strict=True))
    assert one[0].cache is not None and one[0].cache.computed_ratio < 1
    assert [made.cache for made in one] == [made.cache for made in two]


TILES = {"vae_tiling": True, "vae_config": {"tile_sample_min_height": 32, "tile_sample_min_width": 48}}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("family", "options", "strips"),
    [("wan", TILES, 9), ("hunyuan", {}, 3), ("wan", {}, 1)],
    ids=["tiles", "along time", "nothing to share"],
)
def test_decoding_is_shared_out(tmp_path: Path, family: str, options: dict[str, Any], strips: int, size: int) -> None:
    write, spec = {"wan": (wan_repository, wan.T2V_1B), "hunyuan": (hunyuan_repository, hunyuan_video.UNDISTILLED)}[family]
    path = str(write(tmp_path / family, dict(spec.tiny)))
    asked = Request("a red circle", SamplingParams(width=80, height=64, num_frames=33, num_inference_steps=1, seed=5))

    def made(engine: LocalEngine) -> tuple[Frames, int]:
        """What it makes, and in how many steps of decoding."""
        engine.open()
        *events, done = engine.stream(asked)
        engine.shut()
        assert isinstance(done, Done)
        return done.outputs[0].frames, sum(isinstance(event, Progress) and event.stage == "decode" for event in events)

    alone, steps = made(open_engine(validate(EngineOptions, {"model_path": path, "threads": 1, **options})))
    shared, fewer = made(ranked_engine(size, model_path=path, vae_sp=True, **options))
    assert alone == shared and alone.count == 33
    assert fewer * strips == steps * -(-strips // size)


def no_decoder(stage: Any) -> Callable[[], None]:
    whole, stage.decoder.vae = stage.decoder.vae, None
    return lambda: setattr(stage.decoder, "vae", whole)


def no_denoiser(stage: Any) -> Callable[[], None]:
    """Before it has talked to anybody."""
    whole, stage.denoiser = stage.denoiser, None  # nothing can be called
    return lambda: setattr(stage, "denoiser", whole)


def no_block(stage: Any) -> Callable[[], None]:
    """In the middle of a forward, while the first rank waits for its share of heads."""
    block = stage.denoiser.blocks[1]
    block.forward = None
    return lambda: delattr(block, "forward")


@pytest.mark.parametrize(
    ("spread", "stage", "spoil", "message"),
    [
        ({"enable_cfg_parallel": True}, "denoise", no_denoiser, "rank 1 of 2: AttributeError"),
        ({"ulysses_degree": 2}, "denoise", no_block, "part 1 of 2: TypeError"),
        ({"vae_sp": True, **TILES}, "decode", no_decoder, "rank 1 of 2: AttributeError"),
    ],
    ids=["branches", "heads", "decoding"],
)
def test_a_step_that_fails_on_another_rank_fails_its_request_only(
    spread: dict[str, object], stage: str, spoil: Callable[[Any], Callable[[], None]], message: str
) -> None:
    def watch(worker: StepExecutor, ranks: Ranks) -> StepExecutor:
        return worker if ranks.is_first else Spoiled(worker, spoil, stage)

    engine = ranked_engine(2, watch, model_path=WAN, **spread)
    engine.open()
    try:
        *_, failed = engine.stream(Request("a red circle", GUIDED))
        assert isinstance(failed, Failed) and failed.message.startswith(message)
        *_, done = engine.stream(Request("a red circle", GUIDED))
        assert isinstance(done, Done)
        stats = asyncio.run(engine.control(Stats()))
        assert stats.held_samples == 0  # type: ignore[union-attr]
    finally:
        engine.shut()


def test_what_a_lost_rank_was_doing_is_done_again() -> None:
    """Killed in mid-request: the engine's process goes too, both are made anew, and the video is the same."""

    async def result(engine: RemoteEngine, victim: Any = None) -> bytes:
        async for event in engine.generate(Request("a red circle", GUIDED)):
            if isinstance(event, Progress) and event.stage == "denoise" and event.step == 2 and victim:
                os.kill(victim(), signal.SIGKILL)
                victim = None
            if isinstance(event, Done):
                return event.outputs[0].frames.data
            assert not isinstance(event, Failed), event
        raise AssertionError

    async def test() -> None:
        engine = RemoteEngine(EngineOptions(model_path=WAN, num_gpus=2, enable_cfg_parallel=True, threads=1))
        await engine.start()
        try:
            first = await result(engine)
            assert engine._child is not None
            (other,) = followers(engine._child.process.pid)
            assert await result(engine, lambda: other) == first
            assert not Path(f"/proc/{other}/cmdline").exists() and followers(engine._child.process.pid) != [other]
            mine = followers(engine._child.process.pid)
        finally:
            await engine.close()
        assert not any(Path(f"/proc/{pid}/stat").exists() for pid in mine)

    asyncio.run(asyncio.wait_for(test(), 180))


def test_without_a_process_of_its_own_an_engine_that_loses_a_rank_says_so() -> None:
    with DiffGenerator.from_pretrained(WAN, num_gpus=2, threads=1) as several:
        (other,) = followers(os.getpid())

        def kill(event: Event) -> None:
            if isinstance(event, Progress) and event.stage == "denoise" and event.step == 1:
                os.kill(other, signal.SIGKILL)

        with pytest.raises(WorkerLost, match="the engine stopped: the other ranks are gone"):
            several.generate(prompt="a star", num_frames=9, num_inference_steps=50, on_event=kill)
        with pytest.raises(EngineClosed):
            several.generate(prompt="a star")


def test_a_rank_that_dies_while_it_starts_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    def kill() -> None:
        while not (others := followers(os.getpid())):
            time.sleep(0.01)
        os.kill(others[0], signal.SIGKILL)

    threading.Thread(target=kill).start()
    assert main(["generate", "--prompt", "a star", "--model-path", WAN, "--num-gpus", "2"]) == 2
    assert "num_gpus = 2: rank 1 died before it could load the model (exit code -9)" in capsys.readouterr().err


@pytest.mark.parametrize("is_stopped", [False, True], ids=["starting", "stopped"])
def test_ranks_end_with_the_first_one_whatever_they_do(*, is_stopped: bool) -> None:
    line = [sys.executable, "-m", "stepwell", "generate", "--prompt", "a star", "--model-path", WAN, "--num-gpus", "2"]
    with subprocess.Popen(line) as first:
        while not (others := followers(first.pid)):
            time.sleep(0.01)
        if is_stopped:  # once it has said with whom it ends
            while not ignores(others[0], signal.SIGTERM):
                time.sleep(0.01)
            os.kill(others[0], signal.SIGSTOP)
        first.kill()
    until = time.monotonic() + 30
    while is_alive(others[0]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(others[0])


def is_alive(pid: int) -> bool:
    """And not only waiting for somebody to hear of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def ignores(pid: int, which: signal.Signals) -> bool:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigIgn"], 16) >> which - 1 & 1)


def followers(pid: int) -> list[int]:
    """The ranks that a process has started, which may have other children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread may end meanwhile
            found += map(int, (task / "children").read_text().split())
    return [child for child in found if b"stepwell.engine.follower" in _command(child)]


def _command(pid: int) -> bytes:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# ------------------------------------------------------------------------------------------------------- what can't be
def test_what_can_not_be_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*flags: str) -> str:
        assert main(["generate", "--prompt", "a star", *flags]) == 2
        return capsys.readouterr().err

    assert "enable_cfg_parallel = True: takes num_gpus of 2 or more" in refused("--enable-cfg-parallel")
    assert "vae_sp = True: takes num_gpus of 2 or more" in refused("--vae-sp", "--model-path", WAN)
    assert "vae_sp = True: it spreads videos only" in refused("--vae-sp", "--num-gpus", "2")
    assert "num_gpus = 2: LLaDA2MoeModelLM makes text" in refused("--num-gpus", "2", "--model-path", "stepwell/tiny-llada")
    assert "num_gpus = 2: a fake model" in refused("--num-gpus", "2", "--model-path", "stepwell/fake-image")
    assert "sp_degree = 2: takes num_gpus" in refused("--ulysses-degree", "2", "--model-path", "stepwell/fake-image")
    assert "num_gpus = '0': input should be greater than or equal to 1" in refused("--num-gpus", "0")
    for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert "start this with torchrun, or unset RANK" in refused()
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "num_gpus = 2: torchrun has started 3 ranks" in refused("--num-gpus", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Unsupported, match="rank 1 of torchrun: a generator starts its own ranks"):
        DiffGenerator.from_pretrained()


def test_a_rank_that_can_not_load_ends_the_start(tmp_path: Path) -> None:
    shutil.copytree(locate("stepwell/tiny-flux"), tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    before = followers(os.getpid())
    with pytest.raises(WeightsError, match="vae"):
        DiffGenerator.from_pretrained(str(tmp_path / "broken"), num_gpus=2)
    assert followers(os.getpid()) == before


def test_doctor_says_what_is_spread(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", WAN, "--num-gpus", "2", "--enable-cfg-parallel"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "num_gpus" in told and "branches of a step" in told
    assert main(["doctor", "stepwell/tiny-llada", "--num-gpus", "2"]) == 2


# -------------------------------------------------------------------------------------------------------------- torchrun
def test_torchrun_starts_ranks_as_well(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stepwell", "generate",
            "--prompt", "a red circle", "--negative-prompt", "blue", "--true-cfg-scale", "2", "--seed", "4", "--width", "64",
            "--height", "64", "--enable-cfg-parallel", "--threads", "1"]  # fmt: skip
    where = ["--output-path", str(tmp_path), "--output-file-name"]
    made = subprocess.run([*line, *where, "two.png"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    assert main([*line[8:], "--no-enable-cfg-parallel", *where, "one.png"]) == 0
    assert made.stdout.count("saved") == 1
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), np.asarray(Image.open(tmp_path / "two.png")))

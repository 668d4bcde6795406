"""Ranks that hold a sequence together: what they swap, what they agree on, and what becomes of an error of one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from stepwell.cli.main import main
from stepwell.config.schema import EngineOptions
from stepwell.engine.local import LocalEngine
from stepwell.errors import StepFailed
from stepwell.generator import DiffGenerator, open_engine
from stepwell.ops.attention import AttentionKernel
from stepwell.ops.backends import blocked, sdpa
from stepwell.ops.packing import Cut, Lane, Segments
from stepwell.parallel.group import Group
from stepwell.parallel.sequence import Spread
from stepwell.parallel.team import Team
from stepwell.types import CacheParams, Done, Request, SamplingParams, replace
from tests.support.ranks import ranked_engine

FLUX, WAN = "stepwell/tiny-flux", "stepwell/tiny-wan"
PICTURE = SamplingParams(width=64, height=64, num_inference_steps=8, seed=5)


def teams(ulysses: int, ring: int) -> list[Team]:
    """On one thread each they may be used at the same time."""
    size = ulysses * ring
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meet(member: int) -> Team:
        own = TCPStore("127.0.0.1", store.port, is_master=False)
        group = ProcessGroupGloo(own, member, size, timedelta(seconds=60))
        return Team(ulysses, ring, member, cast(Group, group))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(meet, range(size)))


def on_all(teams: list[Team], work: Callable[[Team], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(teams)) as pool:
        return list(pool.map(work, teams))


# --------------------------------------------------------------------------------------------------------- how they talk
def test_they_swap_with_their_row_and_pass_on_to_the_next() -> None:
    def talk(team: Team) -> tuple[list[list[int]], list[int]]:
        mine = [torch.full((1 + team.member, 2), 10 * team.member + other) for other in team.row]
        swapped = team.swap(mine, [1 + other for other in team.row])
        passed = team.pass_on(torch.full((1 + team.member, 3), team.member), 1 + (team.member - team.ulysses) % team.size)
        return [part[:, 0].tolist() for part in swapped], passed[:, 0].tolist()

    assert on_all(teams(2, 2), talk) == [
        ([[0], [10, 10]], [2, 2, 2]),
        ([[1], [11, 11]], [3, 3, 3, 3]),
        ([[22, 22, 22], [32, 32, 32, 32]], [0]),
        ([[23, 23, 23], [33, 33, 33, 33]], [1, 1]),
    ]


def test_a_mean_is_over_all_tokens() -> None:
    def mean(team: Team) -> list[float]:
        cut = Cut((0, 0, 0), (3, 2, 2), team.member)
        lanes = [Lane(None, 1, 0, (1, 1, 7), cut=cut)]
        values = [[float(torch.arange(7.0)[cut.rows[1]].mean()), 2.0]]
        if team.member == 0:  # what is not cut, the first one has
            lanes, values = [Lane(None, 1, 0, (1, 1, 2)), *lanes], [[5.0, 6.0], *values]
        return team.mean(torch.tensor(values), lanes).flatten().tolist()

    first, *others = on_all(teams(3, 1), mean)
    assert first == pytest.approx([5, 6, 3, 2]) and others == [pytest.approx([3, 2])] * 2


@pytest.mark.parametrize("when", ["at once", "between", "at the end"])
def test_an_error_of_one_is_learnt_by_all_and_they_go_on(when: str) -> None:
    def work(team: Team) -> int:
        def step() -> None:
            team.swap([torch.ones(1, 1)] * 2, [1, 1])

        if team.member == 1 and when == "at once":
            raise MemoryError("too much")
        step()
        if team.member == 1 and when == "between":
            raise MemoryError("too much")
        step()
        if team.member == 1:
            raise MemoryError("too much")
        return team.member

    def run(team: Team) -> str:
        try:
            team.together(lambda: work(team))
        except (StepFailed, MemoryError) as error:
            return str(error)
        return "fine"

    both = teams(2, 1)
    for _ in range(2):
        assert on_all(both, run) == ["part 1 of 2: MemoryError: too much", "too much"]
    assert on_all(both, lambda team: team.together(lambda: team.member)) == [0, 1]


# ------------------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (3, 1), (1, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_of_cut_sequences_and_whole_ones(ulysses: int, ring: int, dtype: torch.dtype) -> None:
    heads, prefixes, grids = 6, [7, 0, 9, 2], [(1, 5, 5), (2, 3, 4), (1, 1, 2), (1, 6, 3)]
    lengths = [prefix + grid[0] * grid[1] * grid[2] for prefix, grid in zip(prefixes, grids, strict=True)]
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 16).to(dtype) for _ in range(3))
    kernel: AttentionKernel = blocked.attend if dtype == torch.bfloat16 and ring == 1 else sdpa.attend
    expected = Segments(lengths).split(kernel(q, k, v, Segments(lengths)))

    def attend(team: Team) -> list[Tensor]:
        lanes, rows = [], []
        for prefix, grid, start in zip(prefixes, grids, np.cumsum([0, *lengths[:-1]]).tolist(), strict=True):
            lane = Lane(None, 1, prefix, grid)
            whole = torch.arange(start, start + prefix + lane.tokens)
            lane.cut = team.cut(prefix, lane.tokens)
            if not team.has(lane):
                continue
            if lane.cut is not None:
                text, image = lane.cut.rows
                whole, lane.prefix = torch.cat((whole[:prefix][text], whole[prefix:][image])), text.stop - text.start
            lanes.append(lane)
            rows.append(whole)
        layout = Segments([len(each) for each in rows], lanes)
        own = torch.cat(rows)
        return list(zip(rows, layout.split(Spread(kernel, team)(q[own], k[own], v[own], layout)), strict=True))

    got = torch.zeros(sum(lengths), heads * 16, dtype=dtype)
    for parts in on_all(teams(ulysses, ring), attend):
        for rows, part in parts:
            got[rows] = part
    if ring == 1:
        assert torch.equal(got, torch.cat(expected))
    else:
        torch.testing.assert_close(got, torch.cat(expected), atol=2e-6 if dtype == torch.float32 else 2e-2, rtol=0)


# ---------------------------------------------------------------------------------------------------------- what they make
def made_by(engine: LocalEngine, asked: Request) -> Done:
    engine.open()
    try:
        *_, done = engine.stream(asked)
    finally:
        engine.shut()
    assert isinstance(done, Done), done
    return done


@pytest.mark.parametrize(
    ("model", "cache"),
    [
        (FLUX, CacheParams("teacache", rdt=0.3)),
        (FLUX, CacheParams("first_block", rdt=0.25, warmup=2)),
        (WAN, CacheParams("dbcache", rdt=0.3, warmup=2, fn=1, bn=1, taylorseer=True)),
    ],
    ids=["teacache", "first block", "taylorseer"],
)
def test_a_step_cache_decides_as_on_one_rank(model: str, cache: CacheParams) -> None:
    asked = Request("a red circle", replace(PICTURE, cache=cache, num_frames=5 if model == WAN else 1))
    alone = made_by(open_engine(EngineOptions(model_path=model, threads=1)), asked).outputs[0]
    cut = made_by(ranked_engine(2, model_path=model, sp_degree=2), asked).outputs[0]
    assert alone.cache is not None and cut.cache is not None and alone.cache.computed_ratio < 1
    assert cut.cache.computed_steps == alone.cache.computed_steps and cut.cache.computed_ratio == alone.cache.computed_ratio
    assert cut.frames.data == alone.frames.data


def test_texts_of_any_length_and_pictures_too_small_to_be_cut(repositories: dict[str, Path]) -> None:
    """In one step: what has more tokens on one rank than on the other, and what the first one has alone, all with a cache."""
    path = str(repositories["flux.1-schnell"])
    cache = CacheParams("first_block", rdt=0.4, warmup=1)
    shapes = [(16, 7, 32), (16, 6, 48), (48, 1, 32), (32, 9, 32), (16, 8, 16), (16, 3, 80)]  # width, words, height
    asked = [
        Request("a star", SamplingParams(width=width, height=height, max_sequence_length=words, num_inference_steps=6,
                                         seed=words, cache=cache))
        for width, words, height in shapes
    ]  # fmt: skip
    made = []
    for engine in (
        open_engine(EngineOptions(model_path=path, threads=1)),
        ranked_engine(2, model_path=path, ulysses_degree=2, max_batch_tokens=4096),
    ):
        engine.open()
        with ThreadPoolExecutor(len(asked)) as pool:
            made.append(list(pool.map(lambda each, engine=engine: list(engine.stream(each))[-1], asked)))
        engine.shut()
    for one, cut in zip(*made, strict=True):
        assert isinstance(one, Done) and isinstance(cut, Done)
        assert one.outputs[0].frames == cut.outputs[0].frames
        assert one.outputs[0].cache is not None and cut.outputs[0].cache is not None
        assert one.outputs[0].cache.computed_steps == cut.outputs[0].cache.computed_steps


def test_four_processes_in_teams_of_two_make_what_one_makes() -> None:
    ask: dict[str, Any] = {"prompt": "a red circle moving right", "num_frames": 9, "num_inference_steps": 4, "seed": 3,
                           "guidance_scale": 3.0, "width": 96, "height": 64}  # fmt: skip
    with DiffGenerator.from_pretrained(WAN, threads=1) as alone:
        one = alone.generate(**ask)
    options = {"num_gpus": 4, "ulysses_degree": 2, "enable_cfg_parallel": True, "threads": 1}
    with DiffGenerator.from_pretrained(WAN, **options) as several:
        four = several.generate(**ask)
    assert np.array_equal(one[0].frames, four[0].frames)


# ------------------------------------------------------------------------------------------------------- what can't be
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sp-degree 2", "sp_degree = 2: takes num_gpus of as many, or of several times as many; it is 1"),
        ("--num-gpus 3 --sp-degree 2", "sp_degree = 2: takes num_gpus of as many, or of several times as many; it is 3"),
        ("--num-gpus 4 --sp-degree 4 --ulysses-degree 3", "must be ulysses_degree x ring_degree, which are 3 and 1"),
        ("--num-gpus 4 --sp-size 2 --ring-degree 4", "sp_degree = 2: must be ulysses_degree x ring_degree"),
        ("--num-gpus 2 --ulysses-degree 2 --enable-cfg-parallel", "enable_cfg_parallel = True: takes num_gpus of 4 or more"),
        ("--num-gpus 3 --ulysses-degree 3", "ulysses_degree = 3: must divide the 4 attention heads; ring_degree may be any"),
        ("--num-gpus 2 --ulysses-degree 0", "ulysses_degree = '0': input should be greater than or equal to 1"),
        ("--num-gpus 2 --ring-degree 2 --attention-backend blocked", "blocked with ring_degree = 2: its results for parts"),
        ("--num-gpus 2 --sp-degree 2 --attention-backend block_sparse_torch", "its pattern needs whole sequences"),
    ],
)
def test_what_can_not_be_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str, message: str) -> None:
    for command in (["doctor"], ["generate", "--prompt", "a star", "--output-path", str(tmp_path)]):
        assert main([*command, *flags.split()]) == 2
        assert message in capsys.readouterr().err


def test_a_ring_takes_its_kernel_whatever_text_encoders_are_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    ring = ["doctor", "--num-gpus", "2", "--ring-degree", "2"]
    assert main([*ring, "--component-attention-backends", '{"text_encoder": "eager"}']) == 0
    assert "a ring puts together" in capsys.readouterr().out
    assert main([*ring, "--diffusers-attention-backend", "flash"]) == 2
    assert "diffusers_attention_backend = 'flash'" in capsys.readouterr().err


def test_doctor_says_how_it_is_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["doctor", WAN, "--num-gpus", "8", "--ulysses-degree", "2", "--ring-degree", "2"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "teams of 4 processes, 2 of which swap heads, in a ring of 2" in told and "a ring puts together" in told

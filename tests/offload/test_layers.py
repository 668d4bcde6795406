"""Layer-wise offload, block by block: whatever is called, the right weights are there, and not many more."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.errors import InvalidRequest
from stepwell.offload.homes import FileHome
from stepwell.offload.layers import Streamed
from stepwell.ops.blocks import run_all
from tests.support.repositories import flux_repository

WIDTH, COUNT = 64, 5


class Block(nn.Module):
    """Two matrices of odd sizes and types, and a buffer."""

    def __init__(self, place: int):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH + place)
        self.down = nn.Linear(WIDTH + place, WIDTH).bfloat16()
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor, call: Any) -> Tensor:
        if call == self:
            raise ValueError("this one fails")
        return self.down(torch.relu(self.up(x)).bfloat16()).float() + self.shift


@pytest.fixture
def blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(place) for place in range(COUNT)]


@torch.no_grad()
def run(runner: Any, blocks: Sequence[nn.Module], call: Any = None) -> Tensor:
    return runner(blocks, torch.linspace(-1, 1, WIDTH)[None], call)  # type: ignore[no-any-return]


def streamed(blocks: list[nn.Module], folder: Path) -> Streamed:
    return Streamed(blocks, run_all, FileHome(str(folder)))


def fetched_bytes(runner: Streamed) -> int:
    """Memory that what was fetched takes."""
    return sum(room.memory.nbytes for room in runner._rooms)


def test_any_of_the_blocks_in_any_order(blocks: list[nn.Module], tmp_path: Path) -> None:
    """As a step cache calls: the first alone, then the rest or none; and at random."""
    dice = random.Random(1)
    calls = [blocks, blocks[:1], blocks[1:], blocks[:1], blocks[:1], blocks[1:], [], blocks[2:4], blocks[::-1], [blocks[1]] * 3]
    calls += [dice.sample(blocks, dice.randint(1, COUNT)) for _ in range(50)]
    expected = [run(run_all, some) for some in calls]
    runner = streamed(blocks, tmp_path)
    for some, result in zip(calls, expected, strict=True):
        assert torch.equal(run(runner, some), result)
    largest = max(layer.size_bytes for layer in runner._layers.values())
    assert fetched_bytes(runner) == 2 * largest, "more than two blocks are in memory"
    runner.rest()
    assert fetched_bytes(runner) == 0


def test_what_comes_next_is_fetched_ahead(blocks: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = FileHome(str(tmp_path))
    read: list[int] = []
    plain = home.read
    monkeypatch.setattr(home, "read", lambda sources, targets: read.append(len(sources)) or plain(sources, targets))
    seen: list[list[bool]] = []

    def inner(some: Sequence[nn.Module], x: Any, call: Any) -> Any:
        seen.append([block in runner._held for block in blocks])
        return run_all(some, x, call)

    runner = Streamed(blocks, inner, home)
    for _ in range(2):
        run(runner, blocks)
    # while a block computes, it and the one after it are there, after the last one the first
    assert seen == [[place in (here, (here + 1) % COUNT) for place in range(COUNT)] for here in range(COUNT)] * 2
    assert len(read) == 2 * COUNT + 1
    read.clear()
    for _ in range(6):  # a step cache that skips all but the first block: nothing has to be read again
        run(runner, blocks[:1])
    assert len(read) <= 1


def test_a_block_that_fails_leaves_everything_at_home(blocks: list[nn.Module], tmp_path: Path) -> None:
    expected = run(run_all, blocks)
    runner = streamed(blocks, tmp_path)
    with pytest.raises(ValueError, match="this one fails"):
        run(runner, blocks, call=blocks[2])
    assert fetched_bytes(runner) == 0
    for layer in runner._layers.values():
        assert [t.data_ptr() for t in layer.tensors] == [s.data_ptr() for s in layer.sources]
    assert torch.equal(run(runner, blocks), expected)
    runner.rest()
    assert torch.equal(run(run_all, blocks), expected), "at home the weights are those that were given"


def test_a_file_that_was_cut_short_is_an_error(blocks: list[nn.Module], tmp_path: Path) -> None:
    home = FileHome(str(tmp_path))
    runner = Streamed(blocks, run_all, home)
    home._file.truncate(WIDTH)
    with pytest.raises(OSError, match="cut short"):
        run(runner, blocks)
    assert fetched_bytes(runner) == 0


def test_the_file_has_no_name_and_a_place_that_is_wrong_is_named(blocks: list[nn.Module], tmp_path: Path) -> None:
    runner = streamed(blocks, tmp_path)
    assert not list(tmp_path.iterdir()), "a process that is killed would leave it behind"
    run(runner, blocks)
    with pytest.raises(InvalidRequest, match="offload_path = '/nowhere': can't be written: No such file"):
        FileHome("/nowhere")


# ---------------------------------------------------------------------------------------------------- by the public door
def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def picture(name: str, *flags: str) -> bytes:
        line = ["generate", "--prompt", "a star", "--seed", "1", "--width", "64", "--height", "64", "--threads", "1"]
        assert main([*line, "--output-path", str(tmp_path), "--output-file-name", f"{name}.png", *flags]) == 0
        return (tmp_path / f"{name}.png").read_bytes()

    plain = picture("plain", "--linear-backend", "torch")
    flags = ["--dit-layerwise-offload", "--offload-path", str(tmp_path)]
    assert picture("offloaded", *flags) == plain
    assert (
        picture("every", *flags, "--text-encoder-cpu-offload", "--vae-cpu-offload", "--dit-cpu-offload", "--pin-cpu-memory")
        == plain
    )
    for wrong, message in (
        (
            ["--dit-layerwise-offload", "--linear-backend", "packed"],
            "linear_backend = 'packed': packed weights can't leave memory",
        ),
        (["--dit-layerwise-offload", "--offload-path", "/nowhere"], "offload_path = '/nowhere'"),
    ):
        capsys.readouterr()
        assert main(["generate", "--prompt", "a star", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_doctor_says_what_is_offloaded_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    def says(*flags: str) -> str:
        assert main(["doctor", "stepwell/tiny-flux", *flags]) == 0
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    assert "offload" not in says()
    text = says("--vae-cpu-offload", "--pin-cpu-memory")
    assert "vae_cpu_offload and pin_cpu_memory do not apply: everything is on the CPU already" in text.replace("- ", "-")
    assert "one block ahead" in says("--dit-layerwise-offload")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_model_without_blocks_has_nothing_to_fetch(tmp_path: Path) -> None:
    path = flux_repository(tmp_path, {**COMMON, "num_layers": 0, "num_single_layers": 0})
    small: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 1, "seed": 1, "max_sequence_length": 16}
    with DiffGenerator.from_pretrained(str(path), threads=1, dit_layerwise_offload=True) as generator:
        assert generator.generate("x", **small)[0].frames.shape == (1, 32, 32, 3)


def test_its_tensors_share_a_file_descriptor(tmp_path: Path) -> None:
    with DiffGenerator.from_pretrained(threads=1):  # what is opened once stays
        before = open_files()
    options = {"threads": 1, "dit_layerwise_offload": True, "offload_path": str(tmp_path)}
    with DiffGenerator.from_pretrained(**options):
        assert open_files() < before + 10


def test_a_file_is_mapped_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell.offload.homes.PIECE_BYTES", 3 * 4096)
    home = FileHome(str(tmp_path))
    given = [torch.randn(size) for size in (10, 1000, 5000, 1, 0, 20_000, 3)]
    kept = [home.keep(tensor) for tensor in given]
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))
    targets = [torch.empty_like(tensor) for tensor in given]
    home.read(kept, targets).result()
    assert all(torch.equal(one, other) for one, other in zip(given, targets, strict=True))


COMMON = {"in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 24, "guidance_embeds": True}
MEASURE = """
import json, re, sys
from stepwell import DiffGenerator
with DiffGenerator.from_pretrained(sys.argv[1], threads=1, **json.loads(sys.argv[2])) as generator:
    generator.generate("x", width=32, height=32, num_inference_steps=2, seed=1, max_sequence_length=16)
    print(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


def test_it_saves_the_memory_of_the_blocks(tmp_path: Path) -> None:
    """The whole process's memory, after a picture, beside that of one whose transformer is resident."""
    shape = {
        "num_layers": 2,
        "num_single_layers": 6,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "axes_dims_rope": [16, 24, 24],
    }
    path = flux_repository(tmp_path, {**COMMON, **shape})

    def used_bytes(**options: Any) -> int:
        line = [sys.executable, "-c", MEASURE, str(path), json.dumps(options)]
        return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout) * 1024

    blocks_bytes = 4 * 512 * 512 * (2 * 24 + 6 * 12)
    resident, offloaded = used_bytes(linear_backend="packed"), used_bytes(dit_layerwise_offload=True)
    assert offloaded < resident - 0.6 * blocks_bytes, (resident, offloaded, blocks_bytes)

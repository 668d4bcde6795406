"""--enable-torch-compile: the same pictures, the same bits alone and in company, and nothing compiled after loading.

One small model for all: a first compilation takes ten to twenty seconds.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from stepwell.engine.local import LocalEngine
from stepwell.models.flux import DEV
from stepwell.ops.packing import Segments
from tests.contract.test_contract import check_batch_is_alone, mixed, opened
from tests.support.driving import final_latents, worker_of
from tests.support.families import FAMILIES, Family

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture(scope="module")
def dev() -> Family:
    return next(family for family in FAMILIES if family.spec is DEV)


@pytest.fixture(scope="module")
def small(dev: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dev.write(tmp_path_factory.mktemp("small"), {"num_layers": 1, "num_single_layers": 1})


@pytest.fixture(scope="module")
def compiled(small: Path) -> Iterator[LocalEngine]:
    made = opened(small, enable_torch_compile=True)
    yield made
    made.shut()


def test_compiled_steps_give_the_bits_each_has_alone_and_compile_nothing_new(dev: Family, compiled: LocalEngine) -> None:
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    check_batch_is_alone(dev, compiled)
    assert counters["stats"]["unique_graphs"] == graphs


def test_what_other_models_have_compiled_changes_nothing(
    dev: Family, small: Path, repositories: dict[str, Path], compiled: LocalEngine
) -> None:
    others = [opened(repositories[name], enable_torch_compile=True) for name in ("flux.1-schnell", "wan2.2-ti2v-5b")]
    again = opened(small, enable_torch_compile=True)
    graphs = counters["stats"]["unique_graphs"]
    check_batch_is_alone(dev, again)
    assert counters["stats"]["unique_graphs"] == graphs
    for engine in (*others, again):
        engine.shut()


def test_compiled_steps_make_the_same_latents(dev: Family, small: Path, compiled: LocalEngine) -> None:
    plain, fast = worker_of(small, threads=1), worker_of(small, threads=1, enable_torch_compile=True)
    assert dict((what, value) for what, value, _ in fast.choices)["row_kernels"] == "compiled"
    for asked in mixed(dev):
        difference = (final_latents(plain, asked) - final_latents(fast, asked)).abs().max()
        assert 0 < difference <= 1e-4


@torch.no_grad()
def test_a_sequence_of_one_row_too(compiled: LocalEngine) -> None:
    from stepwell.ops.compiled import compiled_kernels

    kernels = compiled_kernels()
    generator = torch.Generator().manual_seed(0)
    x, update = torch.randn(2, 4, 32, generator=generator)
    gate, shift, scale = torch.randn(3, 2, 32, generator=generator)
    together, alone = Segments([3, 1]), Segments([1])
    both = kernels.gated_add_norm(x, gate, update, shift, scale, together)
    one = kernels.gated_add_norm(x[3:], gate[1], update[3:], shift[1], scale[1], alone)
    assert all(torch.equal(b[3:], o) for b, o in zip(both, one, strict=True))
    normed = kernels.modulated_norm(x, shift, scale, together)
    assert torch.equal(normed[3:], kernels.modulated_norm(x[3:], shift[1], scale[1], alone))


def test_too_many_graphs_end_in_eager_steps_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    from stepwell.ops.compiled import Compiled

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    function = Compiled(double, most_graphs=1)
    with caplog.at_level(logging.WARNING, "stepwell"):
        assert torch.equal(function(torch.ones(3, 4)), torch.full((3, 4), 2.0))
        assert not said(caplog)
        assert torch.equal(function(torch.ones(3, 4, 2)), torch.full((3, 4, 2), 2.0))
        assert torch.equal(function(torch.ones(3, 4)), torch.full((3, 4), 2.0))
    assert said(caplog) == ["double runs eagerly from now on"]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("stepwell")]
    return [record.message.split(":")[0] for record in ours]


def test_without_a_compiler_it_is_refused(small: Path, tmp_path: Path) -> None:
    """In a process of its own: what torch has found out about compilers, and compiled before, it remembers."""
    line = [sys.executable, "-m", "stepwell", "generate", "--model-path", str(small), "--prompt", "x", "--enable-torch-compile"]
    here = {**os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([*line, "--output-path", str(tmp_path / "made")], capture_output=True, text=True, env=here)
    assert run.returncode != 0
    assert "enable_torch_compile = True" in run.stderr and "C++ compiler" in run.stderr
    assert not list((tmp_path / "made").glob("*.png"))

"""What can't fit is refused before it is tried, and the refusal says what can."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepwell import DiffGenerator
from stepwell.engine import memory
from stepwell.errors import InvalidRequest, OutOfMemory


def test_a_size_that_can_not_fit_is_refused_with_one_that_can(flux_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 20 * 2**20)
    with DiffGenerator.from_pretrained(str(flux_dev), threads=1) as g:
        most = g.model.limits.max_pixels
        assert 64 * 64 < most < 512 * 512
        with pytest.raises(
            InvalidRequest, match=r"at most \d+ pixels fit into the memory that is free here; (\d+)×(\d+) would do"
        ) as caught:
            g.generate("a star", width=1024, height=512)
        width, height = (int(side) for side in caught.value.message.split("; ")[1].split(" ")[0].split("×"))
        assert width * height <= most and width > height
        assert g.generate("a star", width=width, height=height, num_inference_steps=1)


def test_tiles_need_less(flux_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)

    def most(*, tiled: bool) -> int:
        with DiffGenerator.from_pretrained(str(flux_dev), vae_tiling=tiled, threads=1) as g:
            return g.model.limits.max_pixels

    assert most(tiled=True) > 4 * most(tiled=False) > 0


@pytest.mark.parametrize(("text", "end"), [("", "or fewer outputs"), ("of 3 bytes", r"or fewer outputs \(of 3 bytes\)")])
def test_memory_that_ran_out_is_told_in_whole_words(text: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gluttony(*_: object) -> None:
        raise MemoryError(*([text] if text else []))

    monkeypatch.setattr("stepwell.stages.decode.DecodeImage.run", gluttony)
    with DiffGenerator.from_pretrained(threads=1) as g, pytest.raises(OutOfMemory, match=f"{end}$"):
        g.generate("a star", width=32, height=32, num_inference_steps=1)

"""Attention kernels from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from stepwell.cli.main import main

GENERATE = ["generate", "--prompt", "a red circle", "--seed", "3", "--threads", "1", "--width", "256", "--height", "192",
            "--num-inference-steps", "2", "--output-path", "."]  # fmt: skip

LAYERS, HEADS = 6, 4  # of the bundled model


def picture(folder: Path, name: str, *flags: str) -> Image.Image:
    assert main([*GENERATE, "--output-path", str(folder), "--output-file-name", name, *flags]) == 0
    return Image.open(folder / name)


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest, in grey levels."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema())  # type: ignore[misc]


def strategy(folder: Path, window: list[int], **changes: list[int]) -> Path:
    """A mask-strategy file for the bundled model with this window everywhere."""
    file = folder / "mask.json"
    file.write_text(json.dumps({f"0_{layer}_{head}": window for layer in range(LAYERS) for head in range(HEADS)} | changes))
    return file


def test_a_mask_strategy_file_through_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = picture(tmp_path, "dense.png", "--attention-backend", "torch_sdpa")
    flags = ("--attention-backend", "sliding_tile_torch")
    monkeypatch.setenv("SGLANG_DIFFUSION_ATTENTION_CONFIG", str(strategy(tmp_path, [9, 9, 9])))
    assert difference(dense, picture(tmp_path, "wide.png", *flags)) <= 1
    strategy(tmp_path, [1, 1, 1])
    narrow = picture(tmp_path, "narrow.png", *flags)
    assert difference(dense, narrow) > 1
    monkeypatch.delenv("SGLANG_DIFFUSION_ATTENTION_CONFIG")
    assert difference(narrow, picture(tmp_path, "window.png", *flags, "--sliding-tile-window", "1,1,1")) == 0


def test_a_variable_left_over_for_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_ATTENTION_CONFIG", str(tmp_path / "gone.json"))
    picture(tmp_path, "plain.png")
    assert "mask_strategy_file_path does not apply: no layer uses sliding tiles" in caplog.text


def test_kernels_by_component(tmp_path: Path) -> None:
    dense = picture(tmp_path, "dense.png")
    parts = {"text_encoder": "eager", "text_encoder_2": "torch_sdpa", "transformer": "torch_sdpa"}
    same = picture(tmp_path, "same.png", "--component-attention-backends", json.dumps(parts))
    assert difference(dense, same) <= 1
    parts = {"transformer.blocks.0": "block_sparse_torch"}
    one = picture(tmp_path, "one.png", "--component-attention-backends", json.dumps(parts), "--attention-sparsity", "0.9")
    assert difference(dense, one) > 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attention-backend", "sage_attn"], "attention_backend = 'sage_attn': needs a CUDA GPU and the package sageattention"),
        (["--attention-backend", "fa"], "flash-attn (module flash_attn), not installed here; use 'torch_sdpa' or 'auto'"),
        (["--attention-backend", "sliding_tile_torch", "--mask-strategy-file-path", "none.json"],
         "mask_strategy_file_path = 'none.json': can't be read: No such file"),
        (["--component-attention-backends", '{"transformer.blocks.77": "blocked"}'], "the nearest is 'transformer.blocks."),
        (["--component-attention-backends", "{"], "component_attention_backends = '{': must be a JSON object, such as {"),
        (["--component-attention-backends", "fa"], """= 'fa': must be a JSON object, such as {"transformer": "torch_sdpa"}"""),
        (["--component-attention-backends", '"fa"'], "must be a JSON object, such as"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_before_any_work(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GENERATE, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_mask_strategy_that_does_not_fit_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = strategy(tmp_path, [1, 1, 1], **{f"0_{LAYERS}_0": [1, 1, 1]})
    flags = ["--attention-backend", "sliding_tile_torch", "--mask-strategy-file-path", str(file)]
    for command in (GENERATE, ["doctor"]):
        assert main([*command, *flags]) == 2
        assert f"key '0_{LAYERS}_0': this model's attention layers are 0 to {LAYERS - 1}" in capsys.readouterr().err


def test_doctor_shows_the_choice_and_what_else_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--component-attention-backends", '{"text_encoder": "eager"}']) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "attention backends here" in text and "block_sparse_torch yes" in text and "sage_attn_3 no" in text
    assert "text_encoder eager" in text

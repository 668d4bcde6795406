"""Repositories that another library quantised: written by diffusers and transformers here, read through the public door."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers import TorchAoConfig as DiffusersConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import T5EncoderModel
from transformers import TorchAoConfig as TransformersConfig

from stepwell import DiffGenerator
from stepwell.cli.main import main

QUICK = ["--num-inference-steps", "2", "--width", "32", "--height", "32", "--threads", "1"]


def picture(repository: Path, **options: Any) -> np.ndarray:
    with DiffGenerator.from_pretrained(str(repository), threads=1, **options) as g:
        return g.generate("a star", width=32, height=32, num_inference_steps=2, seed=1)[0].frames


def decibels(found: np.ndarray, exact: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(found.astype(float) - exact).mean(), 1e-9)))


@pytest.fixture
def copy(flux_dev: Path, tmp_path: Path) -> Path:
    shutil.copytree(flux_dev, tmp_path / "model")
    return tmp_path / "model"


def quantise_transformer(repository: Path, config: Any) -> None:
    folder = repository / "transformer"
    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=DiffusersConfig(config), torch_dtype=torch.float32)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(folder, safe_serialization=True)


def set_method(repository: Path, method: Any, part: str = "transformer") -> None:
    """Say in config.json that weights are quantised, and by what."""
    file = repository / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": method}}))


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()], ids=["w8", "w8a8"])
def test_a_transformer_quantised_by_torchao(flux_dev: Path, copy: Path, config: Any) -> None:
    """Its weights are dequantised: the same bits as from a repository that holds what diffusers makes of them."""
    quantise_transformer(copy, config)
    theirs = FluxTransformer2DModel.from_pretrained(copy / "transformer", torch_dtype=torch.float32)
    widened = FluxTransformer2DModel.from_pretrained(flux_dev / "transformer")
    with torch.no_grad():
        for ours, quantised in zip(widened.parameters(), theirs.parameters(), strict=True):
            ours.copy_(quantised.dequantize())
    widened.save_pretrained(copy / "widened")
    found, exact = picture(copy), picture(flux_dev)
    assert np.array_equal(found, picture(flux_dev, transformer_path=str(copy / "widened")))
    assert 30 < decibels(found, exact) < 90


def test_as_transformer_path_and_quantised_in_memory(flux_dev: Path, copy: Path) -> None:
    quantise_transformer(copy, Int8WeightOnlyConfig())
    assert np.array_equal(picture(flux_dev, transformer_path=str(copy)), picture(copy))
    assert decibels(picture(copy, quantization="int8_weight_only"), picture(copy)) > 30


def test_a_text_encoder_quantised_by_torchao(flux_dev: Path, copy: Path) -> None:
    folder = copy / "text_encoder_2"
    config = TransformersConfig(Int8WeightOnlyConfig())
    model = T5EncoderModel.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder, safe_serialization=True)
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    assert 30 < decibels(picture(copy), picture(flux_dev)) < 90


# ---------------------------------------------------------------------------------------------------------- what doesn't
def fails(repository: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    where = ["--model-path", str(repository), "--output-path", str(repository)]
    assert main(["generate", *where, "--prompt", "a star", *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize(
    ("method", "package", "module"),
    [
        ("torchao", "torchao", "torchao"),
        ("bitsandbytes", "bitsandbytes", "bitsandbytes"),
        ("quanto", "optimum-quanto", "optimum.quanto"),
    ],
)
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_missing_package_is_named(
    part: str,
    method: str,
    package: str,
    module: str,
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    set_method(copy, method, part)
    error = fails(copy, capsys)
    assert f"quantised by {method}" in error and f"pip install {package}" in error and part in error


def test_accelerate_is_named_too(copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_method(copy, "torchao")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "pip install accelerate" in fails(copy, capsys)


def test_pickles_are_not_opened(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_method(copy, "torchao")
    folder = copy / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    assert "holds only pickled weights" in fails(copy, capsys)


@pytest.mark.parametrize("method", ["nunchaku", None, 7])
def test_other_methods_are_refused(method: Any, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_method(copy, method)
    assert f"quant_method is {str(method)!r}; known are torchao, bitsandbytes, quanto" in fails(copy, capsys)


def test_a_config_that_is_no_object(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": "int8"}))
    assert "quantization_config must be an object" in fails(copy, capsys)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"axes_dims_rope": [8, 4, 4]}, "its config.json has axes_dims_rope = [8, 4, 4], that of "),  # no tensor would tell
        ({"guidance_embeds": False}, "its config.json has guidance_embeds = False, that of "),
        ({"quantization_config": "int8"}, "config.json: quantization_config must be an object"),
        ({"quantization_config": [1]}, "config.json: quantization_config must be an object"),
    ],
)
def test_the_config_of_another_transformer(
    changed: dict[str, Any], words: str, flux_dev: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    where = ["--model-path", str(flux_dev), "--transformer-path", str(copy)]
    assert main(["generate", "--prompt", "x", "--output-path", str(copy), *where, *QUICK]) == 2
    error = capsys.readouterr().err
    assert words in error and "AttributeError" not in error and error.count("\n") == 1, error


def test_what_says_nothing_about_the_weights_may_differ(flux_dev: Path, copy: Path) -> None:
    file = copy / "transformer" / "config.json"
    own = json.loads(file.read_text())
    own.pop("pooled_projection_dim")
    file.write_text(json.dumps({**own, "_diffusers_version": "0.1", "_name_or_path": "elsewhere", "out_channels": None}))
    assert np.array_equal(picture(flux_dev, transformer_path=str(copy)), picture(flux_dev))


@pytest.mark.parametrize("option", ["model_path", "transformer_path", "vae_path"])
def test_no_path_is_not_this_folder(
    option: str, flux_dev: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(flux_dev)
    line = ["generate", "--prompt", "x", "--output-path", str(tmp_path), f"--{option.replace('_', '-')}", "", *QUICK]
    assert main(line if option == "model_path" else [*line, "--model-path", str(flux_dev)]) == 2
    assert f"{option} = '': no such folder" in capsys.readouterr().err


def test_a_truncated_quantised_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantise_transformer(copy, Int8WeightOnlyConfig())
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "can't be loaded" in fails(copy, capsys)

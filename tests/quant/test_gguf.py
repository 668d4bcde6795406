"""GGUF checkpoints: written here from a random FLUX by the names BFL published, read through the public door."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors.torch import load_file

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.models.flux import DEV
from stepwell.models.flux_original import ORIGINAL
from stepwell.weights.gguf import Gguf
from tests.support.repositories import flux_repository

Q = gguf.GGMLQuantizationType
QUICK = ["--num-inference-steps", "2", "--width", "32", "--height", "32", "--threads", "1"]
SIZES = {"width": 32, "height": 32, "num_inference_steps": 2, "seed": 1}
WIDE = {**DEV.tiny, "num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}


def original_state(theirs: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A diffusers checkpoint under BFL's names: the inverse of diffusers' own conversion, written out."""
    made: dict[str, torch.Tensor] = {}

    def both(name: str, *parts: str) -> None:
        for kind in ("weight", "bias"):
            made[f"{name}.{kind}"] = torch.cat([theirs[f"{part}.{kind}"] for part in parts])

    embed = "time_text_embed"
    for ours, name in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder")):
        if f"{embed}.{name}.linear_1.weight" in theirs:
            both(f"{ours}.in_layer", f"{embed}.{name}.linear_1")
            both(f"{ours}.out_layer", f"{embed}.{name}.linear_2")
    both("img_in", "x_embedder")
    both("txt_in", "context_embedder")
    both("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = theirs[f"norm_out.linear.{kind}"].chunk(2)
        made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for i in range(config["num_layers"]):
        t, o = f"transformer_blocks.{i}", f"double_blocks.{i}"
        both(f"{o}.img_mod.lin", f"{t}.norm1.linear")
        both(f"{o}.txt_mod.lin", f"{t}.norm1_context.linear")
        both(f"{o}.img_attn.qkv", *(f"{t}.attn.to_{x}" for x in "qkv"))
        both(f"{o}.txt_attn.qkv", *(f"{t}.attn.add_{x}_proj" for x in "qkv"))
        both(f"{o}.img_attn.proj", f"{t}.attn.to_out.0")
        both(f"{o}.txt_attn.proj", f"{t}.attn.to_add_out")
        for stream, mlp in (("img", "ff"), ("txt", "ff_context")):
            both(f"{o}.{stream}_mlp.0", f"{t}.{mlp}.net.0.proj")
            both(f"{o}.{stream}_mlp.2", f"{t}.{mlp}.net.2")
        for stream, middle in (("img", ""), ("txt", "added_")):
            made[f"{o}.{stream}_attn.norm.query_norm.scale"] = theirs[f"{t}.attn.norm_{middle}q.weight"]
            made[f"{o}.{stream}_attn.norm.key_norm.scale"] = theirs[f"{t}.attn.norm_{middle}k.weight"]
    for i in range(config["num_single_layers"]):
        t, o = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        both(f"{o}.modulation.lin", f"{t}.norm.linear")
        both(f"{o}.linear1", *(f"{t}.attn.to_{x}" for x in "qkv"), f"{t}.proj_mlp")
        both(f"{o}.linear2", f"{t}.proj_out")
        made[f"{o}.norm.query_norm.scale"] = theirs[f"{t}.attn.norm_q.weight"]
        made[f"{o}.norm.key_norm.scale"] = theirs[f"{t}.attn.norm_k.weight"]
    return {name: tensor.numpy() for name, tensor in made.items()}


def write(file: Path, state: dict[str, np.ndarray], kind: Q = Q.F32, architecture: str = "flux", prefix: str = "") -> Path:
    """A GGUF file; matrices whose rows are whole blocks are quantised, the rest is float32."""
    writer = gguf.GGUFWriter(file, architecture)
    for name, tensor in state.items():
        fits = tensor.ndim == 2 and tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        stored = kind if fits else Q.F32
        writer.add_tensor(prefix + name, gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def state_of(repository: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    return original_state(load_file(repository / "transformer" / "diffusion_pytorch_model.safetensors"), config)


def picture(repository: Path, file: Path | None = None, **options: Any) -> np.ndarray:
    other = {} if file is None else {"transformer_path": str(file)}
    with DiffGenerator.from_pretrained(str(repository), threads=1, **other, **options) as g:
        return g.generate("a star", **SIZES)[0].frames


@pytest.fixture
def state(flux_dev: Path) -> dict[str, np.ndarray]:
    return state_of(flux_dev, dict(DEV.tiny))


# ------------------------------------------------------------------------------------------------------------ what works
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_float32_makes_the_same_bits(flux_dev: Path, state: dict[str, np.ndarray], tmp_path: Path, prefix: str) -> None:
    file = write(tmp_path / "flux.gguf", state, prefix=prefix)
    assert np.array_equal(picture(flux_dev, file), picture(flux_dev))


def test_schnell_too(repositories: dict[str, Path], tmp_path: Path) -> None:
    schnell = repositories["flux.1-schnell"]
    file = write(tmp_path / "flux.gguf", state_of(schnell, {**DEV.tiny, "guidance_embeds": False}))
    assert np.array_equal(picture(schnell, file), picture(schnell))


def test_bfloat16_is_the_same_as_rounding_ourselves(flux_dev: Path, state: dict[str, np.ndarray], tmp_path: Path) -> None:
    rounded = {name: torch.from_numpy(t).bfloat16().float().numpy() if t.ndim == 2 else t for name, t in state.items()}
    files = [write(tmp_path / "a.gguf", state, Q.BF16), write(tmp_path / "b.gguf", rounded, Q.F32)]
    assert np.array_equal(*(picture(flux_dev, file) for file in files))


@pytest.mark.parametrize(("kind", "least_db"), [(Q.F16, 60), (Q.Q8_0, 50), (Q.Q5_1, 38), (Q.Q4_0, 32)])
def test_fewer_bits_stay_close(kind: Q, least_db: float, tmp_path: Path) -> None:
    """Measured: 68, 58, 44 and 38 dB."""
    repository = flux_repository(tmp_path / "wide", WIDE)
    file = write(tmp_path / "flux.gguf", state_of(repository, WIDE), kind)
    exact, found = picture(repository).astype(float), picture(repository, file).astype(float)
    error = np.square(exact - found).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > least_db
    if kind is not Q.F16:
        assert error > 0


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_k_quants_against_diffusers(kind: Q, tmp_path: Path) -> None:
    """gguf writes none of these, so blocks of random bytes are read; diffusers' own dequantiser says what they mean."""
    rows, (block, size) = 512, gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0).integers(0, 60, (rows, WIDE["joint_attention_dim"] * 8 // block * size), np.uint8)
    config = {**WIDE, "joint_attention_dim": 256, "num_attention_heads": 8}
    state = {name: np.zeros((1, 1), np.float32) for name in ORIGINAL.cuts(config)}
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "flux")
    for name, tensor in state.items():
        if name == "txt_in.weight":
            writer.add_tensor(name, random, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = Gguf(tmp_path / "k.gguf", ORIGINAL, config)
    found = next(tensor for name, tensor in source.tensors() if name == "context_embedder.weight")
    wanted = dequantize_gguf_tensor(GGUFParameter(torch.from_numpy(random), quant_type=kind))
    assert found.shape == (rows, 256)
    assert (found - wanted.float()).norm() < 1e-3 * found.norm()  # it computes in float16


def test_quantised_again_in_memory(flux_dev: Path, state: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = write(tmp_path / "flux.gguf", state, Q.Q8_0)
    assert picture(flux_dev, file, quantization="int8_weight_only").shape == (1, 32, 32, 3)


def test_a_folder_instead_of_the_models_own(flux_dev: Path, repositories: dict[str, Path], tmp_path: Path) -> None:
    other = flux_repository(tmp_path / "other", dict(DEV.tiny), seed=7)
    own = picture(flux_dev)
    replaced = [picture(flux_dev, folder) for folder in (other, other / "transformer")]
    assert np.array_equal(*replaced) and not np.array_equal(own, replaced[0])


# ---------------------------------------------------------------------------------------------------------- what doesn't
def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err, captured.err
    return captured.err


def truncated(file: Path, state: dict[str, np.ndarray]) -> None:
    whole = write(file, state).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def cut_in_the_header(file: Path, state: dict[str, np.ndarray]) -> None:
    file.write_bytes(write(file, state).read_bytes()[:200])


def without_a_tensor(file: Path, state: dict[str, np.ndarray]) -> None:
    write(file, {name: tensor for name, tensor in state.items() if name != "single_blocks.1.linear2.bias"})


def with_another(file: Path, state: dict[str, np.ndarray]) -> None:
    write(file, {**state, "double_blocks.9.img_mod.lin.bias": np.zeros(3, np.float32)})


def too_long(file: Path, state: dict[str, np.ndarray]) -> None:
    longer = np.concatenate([state["single_blocks.0.linear1.bias"]] * 2)
    write(file, {**state, "single_blocks.0.linear1.bias": longer})


def too_wide(file: Path, state: dict[str, np.ndarray]) -> None:
    write(file, {**state, "img_in.weight": np.zeros((32, 99), np.float32)})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "is truncated or not a GGUF file"),
        (cut_in_the_header, "is truncated or not a GGUF file"),
        (lambda file, state: file.write_text("not a model"), "is truncated or not a GGUF file"),
        (lambda file, state: file.write_bytes(b""), "is truncated or not a GGUF file"),
        (
            lambda file, state: write(file, state, architecture="llama"),
            "general.architecture is 'llama', this model takes 'flux'",
        ),
        (without_a_tensor, "1 missing (single_blocks.1.linear2.bias)"),
        (with_another, "1 unexpected (double_blocks.9.img_mod.lin.bias)"),
        (too_long, "single_blocks.0.linear1.bias has shape"),
        (too_wide, "x_embedder.weight has shape (32, 99)"),
        (lambda file, state: None, "no such file"),
    ],
)
def test_broken_files(
    spoil: Callable[[Path, dict[str, np.ndarray]], object],
    reason: str,
    flux_dev: Path,
    state: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "flux.gguf"
    spoil(file, state)
    where = ["--model-path", str(flux_dev), "--transformer-path", str(file), "--output-path", str(tmp_path)]
    error = fails(["generate", *where, "--prompt", "a star", *QUICK], capsys)
    assert reason in error and str(file) in error


def test_other_files_and_a_missing_package(
    flux_dev: Path,
    state: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = tmp_path / "flux.bin"
    plain.write_bytes(b"x")
    start = ["generate", "--model-path", str(flux_dev), "--prompt", "a star", "--output-path", str(tmp_path), *QUICK]
    assert "neither a GGUF file nor a folder" in fails([*start, "--transformer-path", str(plain)], capsys)
    file = write(tmp_path / "flux.gguf", state)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'stepwell[gguf]'" in fails([*start, "--transformer-path", str(file)], capsys)

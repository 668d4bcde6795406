"""Which attention kernel is chosen where: no GPU is asked, the machine is a value."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepwell.config.attention import BACKENDS, MODULES, OF_DIFFUSERS, Site, lacks, table
from stepwell.config.hardware import Hardware, installed
from stepwell.config.load import load
from stepwell.config.masks import MaskStrategy, read_mask_strategy
from stepwell.config.resolve import Plan, resolve
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest, StepwellError, Unsupported

GIB = 2**30
CPU = Hardware("a CPU", cores=8, memory_bytes=16 * GIB)
H100 = Hardware("a CPU", cores=64, memory_bytes=512 * GIB, gpu="NVIDIA H100", capability=(9, 0))
MI300 = Hardware("a CPU", cores=64, memory_bytes=512 * GIB, gpu="AMD MI300X", capability=(9, 4), rocm=True)


def gpu(capability: tuple[int, int], *packages: str) -> Hardware:
    return replace(H100, capability=capability, packages=frozenset(packages))


def plan(hardware: Hardware, environ: dict[str, str] | None = None, **flags: Any) -> Plan:
    options = load((EngineOptions,), flags=flags, environ=environ or {})[EngineOptions]
    return resolve(options, parameters=1_000_000, text_encoders=2, hardware=hardware)


# ------------------------------------------------------------------------------------------------------------ automatic
@pytest.mark.parametrize(
    ("hardware", "flags", "name", "reason"),
    [
        (CPU, {}, "torch_sdpa", "not measured"),
        (replace(CPU, packages=frozenset(MODULES)), {}, "torch_sdpa", "not measured"),  # no library makes a CPU a GPU
        (replace(CPU, measured={"blocked_attention_fp32": 1.5}), {}, "blocked", "1.50×"),
        (H100, {}, "torch_sdpa", "flash-attn.*not installed"),
        (gpu((9, 0), "flash_attn", "flash_attn_interface"), {}, "fa", "^flash_attn_interface "),  # the newer one is faster
        (gpu((9, 0), "flash_attn"), {}, "fa", "^flash_attn "),
        (gpu((10, 0), "flash_attn_interface", "flash_attn.cute"), {}, "fa", "flash_attn.cute"),  # FA3 is for Hopper
        (gpu((8, 9), "flash_attn_interface"), {}, "torch_sdpa", "compute capability.*this one is 8.9"),
        (gpu((7, 5), "flash_attn"), {}, "torch_sdpa", "compute capability 8.x.*this one is 7.5"),  # Turing
        (gpu((9, 0), "flash_attn"), {"dit_precision": "fp32"}, "torch_sdpa", "bf16 or fp16 instead of fp32"),
        (gpu((9, 0), "flash_attn"), {"device": "cpu"}, "torch_sdpa", "not measured"),
        (MI300, {}, "torch_sdpa", "not installed"),
        (replace(MI300, packages=frozenset({"flash_attn"})), {}, "fa", "flash_attn"),
        (gpu((9, 0), "flash_attn"), {"attention_backend": "auto"}, "fa", "flash_attn"),
    ],
)
def test_automatic_choice(hardware: Hardware, flags: dict[str, Any], name: str, reason: str) -> None:
    made = plan(hardware, **flags).attention
    assert made.value == name and re.search(reason, made.reason), made


# -------------------------------------------------------------------------------------------------------------- by name
@pytest.mark.parametrize(
    ("hardware", "flags", "name"),
    [
        (CPU, {"attention_backend": "torch_sdpa"}, "torch_sdpa"),
        (gpu((9, 0), "flash_attn"), {"attention_backend": "torch_sdpa"}, "torch_sdpa"),
        (gpu((9, 0), "flash_attn"), {"attention_backend": "fa3"}, "fa"),
        (gpu((9, 0), "flash_attn"), {"attention_backend": "fa4"}, "fa"),
        (gpu((12, 0), "sageattention"), {"attention_backend": "sage_attn"}, "sage_attn"),
        (gpu((12, 0), "sageattn3"), {"attention_backend": "sage_attn_3"}, "sage_attn_3"),
        (gpu((9, 0), "vsa"), {"attention_backend": "video_sparse_attn"}, "video_sparse_attn"),
        (gpu((9, 0), "st_attn"), {"attention_backend": "sliding_tile_attn", "sliding_tile_window": "3,3,3"}, "sliding_tile_attn"),
        (replace(MI300, packages=frozenset({"aiter"})), {"attention_backend": "aiter"}, "aiter"),
        (CPU, {"attention_backend": "block_sparse_torch", "attention_sparsity": 0.75}, "block_sparse_torch"),
        (CPU, {"diffusers_attention_backend": "native"}, "torch_sdpa"),
        (gpu((8, 0), "flash_attn"), {"diffusers_attention_backend": "flash"}, "fa"),
        (gpu((8, 0), "flash_attn"), {"diffusers_attention_backend": "flash", "attention_backend": "fa3"}, "fa"),
        (gpu((8, 0), "sageattention"), {"diffusers_attention_backend": "sage"}, "sage_attn"),
    ],
)
def test_what_is_asked_for_is_what_runs(hardware: Hardware, flags: dict[str, Any], name: str) -> None:
    assert plan(hardware, **flags).attention.value == name


@pytest.mark.parametrize(
    ("hardware", "flags", "words"),
    [
        (CPU, {"attention_backend": "fa"}, "'fa': needs a CUDA GPU.*package.*flash-attn.*not installed.*use 'torch_sdpa'"),
        (H100, {"attention_backend": "fa3"}, "'fa3': needs the package flash_attn_3 .*flash-attn .*not installed"),
        (gpu((7, 5), "flash_attn"), {"attention_backend": "fa"}, "compute capability.*this one is 7.5"),
        (gpu((9, 0), "flash_attn"), {"attention_backend": "fa", "dit_precision": "fp32"}, "bf16 or fp16 instead of fp32"),
        (H100, {"attention_backend": "sage_attn"}, "package sageattention"),
        (gpu((10, 0), "sageattention"), {"attention_backend": "sage_attn"}, "8.0, 8.6, 8.9, 9.0, 12.0 .*this one is 10.0"),
        (gpu((9, 0), "sageattn3"), {"attention_backend": "sage_attn_3"}, "12.0 for sageattn3, this one is 9.0"),
        (H100, {"attention_backend": "sliding_tile_attn"}, "package st_attn .*use 'sliding_tile_torch'"),
        (H100, {"attention_backend": "video_sparse_attn"}, "package vsa .*use 'block_sparse_torch'"),
        (gpu((9, 0), "aiter"), {"attention_backend": "aiter"}, "needs an AMD GPU under ROCm"),
        (MI300, {"attention_backend": "aiter"}, "package aiter"),
        (replace(MI300, packages=frozenset({"sageattention"})), {"attention_backend": "sage_attn"}, "needs a CUDA GPU"),
        (gpu((9, 0), *MODULES), {"attention_backend": "vmoba_attn"}, "not in this version.*vmoba"),
        (H100, {"attention_backend": "blocked"}, "needs a CPU"),
        (CPU, {"diffusers_attention_backend": "xformers"}, "no xformers.*torch_sdpa"),
        (CPU, {"diffusers_attention_backend": "_flash_3_hub"}, "never fetched from a hub"),
        (
            CPU,
            {"diffusers_attention_backend": "flash"},
            "diffusers_attention_backend = 'flash', which is 'fa': needs.*flash-attn",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_what_it_lacks(hardware: Hardware, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words) as error:
        plan(hardware, **flags)
    assert error.value.param in flags


def test_two_names_that_disagree() -> None:
    with pytest.raises(InvalidRequest, match="'native' means 'torch_sdpa', and attention_backend is 'blocked'"):
        plan(CPU, diffusers_attention_backend="native", attention_backend="blocked")
    assert set(OF_DIFFUSERS.values()) <= set(BACKENDS)


# ---------------------------------------------------------------------------------------------------------- by component
def test_components_beat_the_flag() -> None:
    parts = {"transformer": "torch_sdpa", "text_encoder": "eager", "text_encoder_2": "fa4", "transformer.blocks.0": "fa3"}
    hardware = gpu((9, 0), "flash_attn", "sageattention")
    made = plan(hardware, attention_backend="sage_attn", component_attention_backends=json.dumps(parts))
    assert made.attention.value == "torch_sdpa"
    assert [(part, choice.value) for part, choice in made.attention_parts] == [
        ("text_encoder", "eager"),
        ("text_encoder_2", "flash_attention_2"),
        ("transformer.blocks.0", "fa"),
    ]
    rows = {what: value for what, value, _ in made.lines()}
    assert rows["attention"] == "torch_sdpa" and rows["attention of text_encoder"] == "eager"


@pytest.mark.parametrize(
    ("hardware", "parts", "words"),
    [
        (CPU, {"text_encoder_3": "eager"}, "unknown name 'text_encoder_3'.*did you mean 'text_encoder"),
        (CPU, {"transfomer": "eager"}, "unknown name 'transfomer'.*did you mean 'transformer'"),
        (CPU, {"transformer": "torch_sdp"}, "did you mean 'torch_sdpa'"),
        (CPU, {"transformer.blocks.0": "fa"}, "component_attention_backends: transformer.blocks.0 = 'fa': needs.*flash-attn"),
        (CPU, {"text_encoder": "sage_attn"}, "text_encoder = 'sage_attn': transformers.*torch_sdpa, eager, fa"),
        (CPU, {"text_encoder": "fa"}, "text_encoder = 'fa': needs"),
        (gpu((9, 0), "flash_attn_interface"), {"text_encoder": "fa"}, "package flash-attn .*not installed"),  # FA3 won't do
        (gpu((7, 5), "flash_attn"), {"text_encoder_2": "fa"}, "compute capability 8.x.*this one is 7.5"),
        (CPU, {"transformer.blocks.0": "sliding_tile_torch"}, "sliding_tile_torch needs its windows"),
        (CPU, {"transformer": 3}, "valid string"),
    ],
)
def test_components_that_cannot_be(hardware: Hardware, parts: dict[str, Any], words: str) -> None:
    with pytest.raises(StepwellError, match=words):
        plan(hardware, component_attention_backends=parts)


def test_a_text_encoder_s_own_precision_counts() -> None:
    parts = {"text_encoder_2": "fa"}
    hardware = gpu((9, 0), "flash_attn")
    plan(hardware, component_attention_backends=parts, text_encoder_precisions=["fp32", "bf16"])
    with pytest.raises(Unsupported, match="text_encoder_2 = 'fa': needs precision bf16 or fp16 instead of fp32"):
        plan(hardware, component_attention_backends=parts, text_encoder_precisions=["bf16", "fp32"])


# ------------------------------------------------------------------------------------------------ options of the patterns
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"attention_backend": "sliding_tile_torch"}, "SGLANG_DIFFUSION_ATTENTION_CONFIG.*sliding_tile_window = 3,3,3"),
        (
            {"attention_backend": "sliding_tile_torch", "sliding_tile_window": "1,1,1", "mask_strategy_file_path": "m.json"},
            "twice; give one",
        ),
        ({"sliding_tile_window": [1, 1, 1]}, "no layer uses sliding tiles"),
        ({"attention_sparsity": 0.5}, "no layer skips tiles"),
        ({"attention_backend": "block_sparse_torch", "attention_sparsity": 1}, "attention_sparsity = 1"),
        ({"attention_backend": "sliding_tile_torch", "sliding_tile_window": "1,1"}, "sliding_tile_window"),
        ({"attention_backend": "sliding_tile_torch", "sliding_tile_window": "1,0,1"}, "sliding_tile_window"),
    ],
)
def test_options_of_sparse_patterns(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        plan(CPU, **flags)


@pytest.mark.parametrize("variable", ["SGLANG_DIFFUSION_ATTENTION_CONFIG", "STEPWELL_MASK_STRATEGY_FILE_PATH"])
def test_flag_and_both_variables_feed_one_field(variable: str) -> None:
    options = load((EngineOptions,), flags={}, environ={variable: "/abs/m.json"})[EngineOptions]
    assert options.mask_strategy_file_path == "/abs/m.json"
    assert plan(CPU, {variable: "/abs/m.json"}, attention_backend="sliding_tile_torch").attention.value == "sliding_tile_torch"


# --------------------------------------------------------------------------------------------------------- what is there
def test_the_table_agrees_with_the_choice() -> None:
    site = Site("cuda", "bf16", gpu((9, 0), "flash_attn", "st_attn"))
    rows = {name: usable for name, usable, _ in table(site)}
    assert {name for name, usable in rows.items() if usable == "yes"} == {
        "torch_sdpa", "fa", "sliding_tile_attn", "sliding_tile_torch", "block_sparse_torch", "triton",
    }  # fmt: skip
    for name in rows:
        assert (lacks(name, site) is None) == (rows[name] == "yes")


def test_packages_are_found_without_importing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for folder in ("vendor_a", "vendor_b/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "vendor_a" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "vendor_b" / "deep" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "vendor_c.py").write_text("")
    asked = ("vendor_a", "vendor_a.more", "vendor_b", "vendor_b.deep", "vendor_c", "vendor_c.deep", "vendor_d")
    assert installed(asked) == {"vendor_a", "vendor_b.deep", "vendor_c"}
    assert not {"vendor_a", "vendor_b"} & set(sys.modules)


# ---------------------------------------------------------------------------------------------------- mask-strategy files
WHOLE = {f"{t}_{layer}_{h}": [t + 1, layer + 1, h + 1] for t in range(3) for layer in range(2) for h in range(2)}


def test_a_mask_strategy_is_read_and_spread_over_the_steps(tmp_path: Path) -> None:
    file = tmp_path / "mask.json"
    file.write_text(json.dumps(WHOLE))
    strategy = read_mask_strategy(str(file), 2, 2)
    for step in range(3):  # as many steps as timesteps: each its own
        assert strategy.at(step, 3, 1) == ((step + 1, 2, 1), (step + 1, 2, 2))
    assert [strategy.at(step, 6, 0)[0][0] for step in range(6)] == [1, 1, 2, 2, 3, 3]
    assert [strategy.at(step, 2, 0)[0][0] for step in range(2)] == [1, 2]
    assert MaskStrategy.uniform((1, 3, 5), 2, 4).at(7, 8, 1) == ((1, 3, 5),) * 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**WHOLE, "0_0_0": [1, 2]}, "key '0_0_0': \\[1, 2\\] must be three whole numbers"),
        ({**WHOLE, "0_0_0": [1, 2, 0]}, "key '0_0_0'"),
        ({**WHOLE, "0_0_0": [1, 2, True]}, "key '0_0_0'"),
        ({**WHOLE, "0_0_0": [1, 2, 1.5]}, "key '0_0_0'"),
        ({**WHOLE, "0_0_0": "1,2,3"}, "key '0_0_0'"),
        ({**WHOLE, "0_0": [1, 1, 1]}, "key '0_0': must be timestep_layer_head"),
        ({**WHOLE, "a_0_0": [1, 1, 1]}, "key 'a_0_0'"),
        ({**WHOLE, "-1_0_0": [1, 1, 1]}, "key '-1_0_0'"),
        ({**WHOLE, "0_2_0": [1, 1, 1]}, "key '0_2_0': this model's attention layers are 0 to 1"),
        ({**WHOLE, "0_0_2": [1, 1, 1]}, "key '0_0_2': this model's heads are 0 to 1"),
        ({k: v for k, v in WHOLE.items() if k != "1_0_1"}, "key '1_0_1' is missing; 3 timesteps × 2 layers × 2 heads"),
        ({**WHOLE, "999999999_0_0": [1, 1, 1]}, "key '3_0_0' is missing"),
        ({}, "it holds no windows"),
        ([1], "must hold an object"),
        ('{"0_0_0": [1, 1, 1], "0_0_0": [1, 1, 1]}', "key '0_0_0' is there twice"),
        ('{"0_0_0": [1, 1, 1],}', "is not JSON.*line 1"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_one_wrong_byte_refuses_the_file(content: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mask.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidRequest, match=words) as error:
        read_mask_strategy(str(file), 2, 2)
    assert str(file) in error.value.message and error.value.param == "mask_strategy_file_path"


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    mask, config = tmp_path / "mask.json", tmp_path / "config.json"
    mask.write_text(json.dumps(WHOLE), encoding="utf-8-sig")
    assert read_mask_strategy(str(mask), 2, 2).windows
    config.write_text('{"threads": 3}', encoding="utf-8-sig")
    assert load((EngineOptions,), flags={}, file=config)[EngineOptions].threads == 3

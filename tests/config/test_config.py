"""Options: where they come from, what beats what, what is chosen when they are left open, and what is generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepwell.config.hardware import Hardware, detect_cpu
from stepwell.config.load import load
from stepwell.config.render import FILES, SECTIONS
from stepwell.config.resolve import Plan, resolve
from stepwell.config.schema import EngineOptions, SamplingOptions, extra_of
from stepwell.errors import InvalidRequest, StepwellError, Unsupported

GIB = 2**30
LAPTOP = Hardware("a CPU", cores=8, memory_bytes=16 * GIB)
H200 = Hardware("a CPU", cores=64, memory_bytes=512 * GIB, gpu="NVIDIA H200")


def options(flags: dict[str, Any] | None = None, **sources: Any) -> EngineOptions:
    made: EngineOptions = load((EngineOptions,), flags=flags or {}, **{"environ": {}, **sources})[EngineOptions]
    return made


def plan(hardware: Hardware, parameters: int = 10_000_000, **flags: Any) -> Plan:
    return resolve(options(flags), parameters=parameters, text_encoders=2, hardware=hardware)


# ------------------------------------------------------------------------------------------------------------ precedence
def test_commas_part_models_in_the_environment_only() -> None:
    environ = {"STEPWELL_MODEL_PATH": "org/a, /models/b"}
    assert options(environ=environ).model_paths == ("org/a", "/models/b")
    assert options({"model_path": "/models/a,b"}, environ=environ).model_paths == ("/models/a,b",)
    with pytest.raises(InvalidRequest, match="none twice"):
        options(environ={"STEPWELL_MODEL_PATH": "a,a"})


def test_flags_beat_environment_beats_file_beats_base(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("threads: 2\nmax_running_samples: 2\nmax_queued_samples: 2\n")
    environ = {"STEPWELL_MAX_RUNNING_SAMPLES": "3", "STEPWELL_MAX_QUEUED_SAMPLES": "3"}
    base = dict.fromkeys(("threads", "max_running_samples", "max_queued_samples", "prompt_cache_mb"), 1)
    made = options({"max_queued_samples": "4"}, file=file, environ=environ, base=base)
    assert (made.prompt_cache_mb, made.threads, made.max_running_samples, made.max_queued_samples) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "field"),
    [("sp_size", "sp_degree"), ("precision", "dit_precision"), ("model", "model_path"), ("dit-precision", "dit_precision")],
)
def test_aliases(name: str, field: str) -> None:
    value: Any = 1 if field == "sp_degree" else "fp32"
    assert getattr(options({name: value}), field) == value


def test_old_variables_are_read_under_both_names() -> None:
    for name in ("SGLANG_CACHE_DIT_ENABLED", "STEPWELL_CACHE_DIT_ENABLED"):
        assert options(environ={name: "false"}).cache_dit_enabled is False
        assert options(environ={name: "true"}).cache_dit_enabled is True
    with pytest.raises(InvalidRequest, match="did you mean 'SGLANG_CACHE_DIT_WARMUP'"):
        options(environ={"SGLANG_CACHE_DIT_WARMUPS": "4"})
    with pytest.raises(InvalidRequest, match="cache_dit_fn = 'x'"):
        options(environ={"SGLANG_CACHE_DIT_FN": "x"})


@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_missing_is_refused_with_its_reason(section: type) -> None:
    """Every option with `only` accepts its default and refuses the rest; the reason is in the message."""
    for name, field in section.model_fields.items():  # type: ignore[attr-defined]
        extra = extra_of(field)
        if extra["only"] is None:
            continue
        assert field.get_default() in extra["only"] and extra["why"]
        other: Any = {bool: True, int: 7, float: 0.5}.get(field.annotation, "something")
        if name == "backend":
            other = "diffusers"
        if name == "diffusers_attention_backend":
            other = "xformers"
        if field.annotation == dict[str, Any] | None:
            other = {"a": 1}
        if "int" in str(field.annotation) and "None" in str(field.annotation):
            other = 7
        with pytest.raises(Unsupported) as error:
            load((section,), flags={name: other}, environ={})
        assert name in str(error.value) and str(extra["why"]) in str(error.value)


# ------------------------------------------------------------------------------------------------------------- decisions
@pytest.mark.parametrize(
    ("hardware", "parameters", "flags", "expected"),
    [
        (LAPTOP, 10_000_000, {}, {"device": "cpu", "dit": "fp32", "linear": "packed", "attention": "torch_sdpa"}),
        (LAPTOP, 12_000_000_000, {}, {"dit": "bf16"}),
        (LAPTOP, 12_000_000_000, {"dit_precision": "fp32"}, {"dit": "fp32"}),
        (
            H200,
            12_000_000_000,
            {},
            {"device": "cuda", "dit": "bf16", "vae": "bf16", "linear": "torch", "attention": "torch_sdpa"},
        ),
        (H200, 12_000_000_000, {"device": "cpu"}, {"device": "cpu", "dit": "fp32"}),
        (
            H200,
            1,
            {"vae_precision": "fp32", "text_encoder_precisions": ["fp16", "bf16"]},
            {"vae": "fp32", "text": ["fp16", "bf16"]},
        ),
        (H200, 1, {"text_encoder_precisions": "fp32"}, {"text": ["fp32", "fp32"]}),
        (LAPTOP, 1, {"attention_backend": "blocked", "linear_backend": "torch"}, {"attention": "blocked", "linear": "torch"}),
    ],
)
def test_plan(hardware: Hardware, parameters: int, flags: dict[str, Any], expected: dict[str, Any]) -> None:
    made = plan(hardware, parameters, **flags)
    found = {
        "device": made.device.value,
        "dit": made.dit_precision.value,
        "vae": made.vae_precision.value,
        "linear": made.linear.value,
        "attention": made.attention.value,
        "text": [choice.value for choice in made.text_encoder_precisions],
    }
    assert {name: found[name] for name in expected} == expected
    assert all(reason for _, _, reason in made.lines())


@pytest.mark.parametrize(
    ("measured", "linear", "attention"),
    [
        ({}, "packed", "torch_sdpa"),
        ({"packed_linear_fp32": 2.2, "blocked_attention_fp32": 3.1}, "packed", "blocked"),
        ({"packed_linear_fp32": 0.9, "blocked_attention_fp32": 1.2}, "packed", "torch_sdpa"),  # within noise: the default stays
        ({"packed_linear_fp32": 0.5, "blocked_attention_fp32": 0.5}, "torch", "torch_sdpa"),
    ],
)
def test_kernels_are_chosen_by_measurement(measured: dict[str, float], linear: str, attention: str) -> None:
    made = plan(Hardware("a CPU", measured=measured))
    assert (made.linear.value, made.attention.value) == (linear, attention)


@pytest.mark.parametrize(
    ("hardware", "flags", "kinds", "words"),
    [
        (LAPTOP, {}, set(), ""),
        (LAPTOP, {"vae_cpu_offload": True}, set(), "vae_cpu_offload does not apply: everything is on the CPU already"),
        (LAPTOP, {"dit_layerwise_offload": True, "pin_cpu_memory": True}, {"layers"}, "pin_cpu_memory does not apply"),
        (H200, {"text_encoder_cpu_offload": True, "pin_cpu_memory": True}, {"text_encoder"}, "as asked"),
        (H200, {"dit_cpu_offload": True, "dit_layerwise_offload": True}, {"dit", "layers"}, "as asked"),
        (H200, {"pin_cpu_memory": True}, set(), "pin_cpu_memory does not apply: nothing is offloaded"),
    ],
)
def test_what_is_offloaded(hardware: Hardware, flags: dict[str, Any], kinds: set[str], words: str) -> None:
    made = plan(hardware, **flags)
    assert made.offloaded == kinds and words in made.offload.reason
    assert made.offload.is_warning == ("not apply" in words)
    assert any(what == "offload" for what, _, _ in made.lines()) == bool(flags)


def test_blocks_in_a_file_are_computed_with_plain_linears() -> None:
    made = plan(Hardware("a CPU", measured={"packed_linear_fp32": 9.0}), dit_layerwise_offload=True)
    assert made.linear.value == "torch" and "can't leave memory" in made.linear.reason


def test_the_token_budget_follows_the_work_of_a_token() -> None:
    measured = Hardware("a CPU", measured={"gflops_fp32": 100.0})
    small, large = plan(measured, 1_000_000), plan(measured, 100_000_000)
    assert int(small.batch_tokens.value) == 1000 and int(large.batch_tokens.value) == 10
    assert plan(measured, max_batch_tokens=77).batch_tokens.value == "77"


@pytest.mark.parametrize(
    ("hardware", "flags", "words"),
    [
        (LAPTOP, {"device": "cuda"}, "no CUDA GPU"),
        (LAPTOP, {"dit_precision": "fp16"}, "fp32 or bf16"),
        (H200, {"attention_backend": "blocked"}, "needs a CPU"),
        (H200, {"linear_backend": "packed"}, "for CPUs"),
        (LAPTOP, {"linear_backend": "packed", "dit_layerwise_offload": True}, "can't leave memory"),
        (H200, {"text_encoder_precisions": ["fp32"] * 3}, "2 text encoders"),
    ],
)
def test_impossible_wishes(hardware: Hardware, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(StepwellError, match=words):
        plan(hardware, **flags)


def test_this_machine_is_detected() -> None:
    here = detect_cpu()
    assert here.cores >= 1 and here.memory_bytes > GIB and here.cpu


# ------------------------------------------------------------------------------------------------------------- generated
def test_generated_files_are_up_to_date() -> None:
    for name, make in FILES.items():
        assert (Path("docs") / name).read_text() == make(), f"docs/{name}: run `make docs`"


def test_the_example_loads_and_holds_every_option() -> None:
    text = FILES["config.example.yaml"]()
    example = yaml.safe_load(text)
    load(tuple(SECTIONS), flags=example, environ={})
    properties = json.loads(FILES["config.schema.json"]())["properties"]
    for section in SECTIONS:
        for name in section.model_fields:
            assert name in text and name in properties


@pytest.mark.parametrize("name", ["threads", "max_running_samples"])
def test_booleans_are_no_numbers(name: str) -> None:
    with pytest.raises(InvalidRequest, match="boolean"):
        options({name: True})


def test_objects_in_the_environment_and_what_is_missing_inside_them() -> None:
    made = options(environ={"STEPWELL_VAE_CONFIG": '{"load_encoder": true}'})
    assert made.vae_config.load_encoder is True
    with pytest.raises(Unsupported, match="load_decoder"):
        options({"vae_config": {"load_decoder": False}})
    assert options(environ={"STEPWELL_PORT": "tcp://10.0.0.1:80", "STEPWELL_SERVICE_HOST": "10.0.0.1"})


def test_an_unknown_name_in_a_nested_object() -> None:
    with pytest.raises(
        InvalidRequest, match="vae_config.tile_sample_min_heigth.*did you mean 'vae_config.tile_sample_min_height'"
    ):
        options({"vae_config": {"tile_sample_min_heigth": 3}})
    with pytest.raises(InvalidRequest, match="seed = 'x'"):
        load((SamplingOptions,), flags={"seed": "x"}, environ={})


@pytest.mark.parametrize(("asked", "gpu", "triton", "value", "reason"), [
    ({}, None, "3.9", "plain", "CPU"),
    ({"enable_torch_compile": True}, None, None, "compiled", "0.85 to 1.06×"),
    ({}, "H100", "3.9", "plain", "timed on a GPU"),
    ({"fused_kernels": True}, "H100", "3.9", "triton", "as asked"),
    ({"enable_torch_compile": True}, "H100", "3.9", "compiled", "as asked"),
])  # fmt: skip
def test_row_kernels_are_chosen_with_a_reason(
    asked: dict[str, object], gpu: str | None, triton: str | None, value: str, reason: str
) -> None:
    options, hardware = EngineOptions(**asked), Hardware(gpu=gpu, triton=triton)  # type: ignore[arg-type]
    chosen = resolve(options, parameters=1000, text_encoders=2, hardware=hardware).row_kernels
    assert chosen.value == value and reason in chosen.reason


@pytest.mark.parametrize(("asked", "gpu", "triton"), [
    ({}, None, "3.9"), ({}, "H100", None), ({"enable_torch_compile": True}, "H100", "3.9"),
])  # fmt: skip
def test_fused_kernels_that_cannot_be_are_refused(asked: dict[str, object], gpu: str | None, triton: str | None) -> None:
    options = EngineOptions(fused_kernels=True, **asked)  # type: ignore[arg-type]
    with pytest.raises(StepwellError, match="fused_kernels = True"):
        resolve(options, parameters=1000, text_encoders=2, hardware=Hardware(gpu=gpu, triton=triton))

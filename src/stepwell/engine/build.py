"""From options to a worker: the one place that knows every part and the order of the passes.

meta build → load weights → attention kernels → CPU linears → row order → row kernels → stages. A pass gets a plain finished
module and changes it at one of the four seams (`ops.Linear`, `ops.Attention`, `ops.RowMaths`, `ops.Blocks`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from stepwell.config.hardware import Hardware
from stepwell.config.resolve import Choice, Plan, resolve
from stepwell.config.schema import EngineOptions
from stepwell.engine import measure
from stepwell.engine.memory import fitting
from stepwell.engine.worker import Worker, WorkerSettings
from stepwell.errors import StepwellError, Unsupported, WeightsError
from stepwell.models import find_spec, parts
from stepwell.models.spec import ModelSpec
from stepwell.ops.attention import Attention
from stepwell.ops.backends import blocked, sdpa
from stepwell.ops.linear import BySegment, Linear, PackedLinear, is_row_invariant
from stepwell.ops.rows import RowKernels, RowMaths, largest_difference
from stepwell.stages.base import Pipeline, StageSettings
from stepwell.types import ModelInfo, SamplingParams, Task
from stepwell.weights.hub import locate
from stepwell.weights.reader import load_weights
from stepwell.weights.repository import Repository, open_repository

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
logger = logging.getLogger(__name__)
KERNELS = {"torch_sdpa": sdpa.attend, "blocked": blocked.attend}


def build_worker(options: EngineOptions) -> Worker:
    """Load a model and make it ready to step. Raises StepwellError naming the option or file at fault."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return _build(options)
    except StepwellError:
        raise
    except Exception as error:  # a repository can be odd in more ways than anybody lists
        logger.debug("loading failed", exc_info=error)
        text = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{options.model_path!r} can't be loaded: {type(error).__name__}: {text}", param="model_path"
        ) from error


def _build(options: EngineOptions) -> Worker:
    repository = open_repository(options.model_path)
    spec = find_spec(repository)
    with torch.device("meta"):
        denoiser = spec.build_denoiser(repository.denoiser_config)
    plan = make_plan(options, repository, spec, denoiser)
    row_bound = find_row_bound(denoiser, plan)
    device, dtype = plan.device.value, DTYPES[plan.dit_precision.value]
    folder = repository.path / spec.parts["transformer"].folder
    load_weights(denoiser, folder, spec.key_map(repository.denoiser_config), dtype, device)
    denoiser.eval()
    set_attention(denoiser, plan.attention.value)
    if plan.linear.value == "packed":
        pack_linears(denoiser)
    split_linears(denoiser, row_bound)
    plan = replace(plan, row_kernels=set_row_kernels(denoiser, plan, _attention_shape(repository), options))
    loaded = {**_load_parts(options, repository, spec, plan), "transformer": denoiser}
    pipeline = spec.pipeline(
        loaded,
        StageSettings(prompt_cache_bytes=options.prompt_cache_mb * 2**20),
    )
    choices = (*plan.lines(), packing_line(row_bound, plan))
    settings = WorkerSettings(int(plan.batch_tokens.value), options.threads, device, choices)
    info = _info(options, repository, spec, plan, pipeline)
    heads, head_dim = _attention_shape(repository)
    fits = fitting(info.limits, loaded["vae"], heads * head_dim, tiled=options.vae_tiling, device=plan.device.value)
    return Worker(replace(info, limits=fits), pipeline, settings)


def make_plan(options: EngineOptions, repository: Repository, spec: ModelSpec, denoiser: nn.Module) -> Plan:
    """Measure what matters for this model on this machine, then decide."""
    hardware = measure.detect()
    parameters = sum(p.numel() for p in denoiser.parameters())
    encoders = sum(part.kind == "text_encoder" for part in spec.parts.values())

    def plan(with_hardware: Hardware) -> Plan:
        return resolve(options, parameters=parameters, text_encoders=encoders, hardware=with_hardware)

    first = plan(hardware)
    if first.device.value != "cpu":
        return first
    heads, head_dim = _attention_shape(repository)
    return plan(measure.measure_cpu(hardware, first.dit_precision.value, heads * head_dim, heads, head_dim))


def _attention_shape(repository: Repository) -> tuple[int, int]:
    config = repository.denoiser_config
    return int(config.get("num_attention_heads", 24)), int(config.get("attention_head_dim", 128))


# ------------------------------------------------------------------------------------------------------------- passes
def set_attention(denoiser: nn.Module, name: str) -> None:
    """Attention seam: the kernel of every attention layer."""
    for module in denoiser.modules():
        if isinstance(module, Attention):
            module.kernel = KERNELS[name]


def pack_linears(denoiser: nn.Module) -> None:
    """Linear seam: replace every linear of the blocks and embedders that steps use by its packed form."""
    for module in denoiser.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))


def find_row_bound(denoiser: nn.Module, plan: Plan) -> list[str]:
    """The linears whose kernels, on this CPU, sum in an order that depends on the number of rows: their names.

    In one call for all samples they would let a picture depend on its neighbours. Every distinct shape of the plain
    module is probed; it may be on the meta device. A GPU is asked no such promise.
    """
    if plan.device.value != "cpu":
        return []
    dtype, packed = DTYPES[plan.dit_precision.value], plan.linear.value == "packed"
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, Linear)}
    shapes = {_shape(layer): layer for layer in layers.values()}
    bound = {shape for shape, layer in shapes.items() if not is_row_invariant(layer, dtype, packed=packed)}
    return [name for name, layer in layers.items() if _shape(layer) in bound]


def _shape(layer: nn.Linear) -> tuple[int, int, type[nn.Linear]]:
    return layer.in_features, layer.out_features, type(layer)


def split_linears(denoiser: nn.Module, names: list[str]) -> None:
    """Linear seam: run these layers sequence by sequence."""
    for name in names:
        denoiser.set_submodule(name, BySegment(denoiser.get_submodule(name)))


def set_row_kernels(denoiser: nn.Module, plan: Plan, attention_shape: tuple[int, int], options: EngineOptions) -> Choice:
    """Row seam: kernels that pass a trial on this model's width. What was asked for and fails is an error, else a warning."""
    chosen = plan.row_kernels
    if chosen.value == "plain":
        return chosen
    try:
        kernels = _row_kernels(chosen.value)
        error = largest_difference(kernels, *attention_shape, DTYPES[plan.dit_precision.value], plan.device.value)
        problem = None if error <= 1 else f"results differ from eager ones by {error:.1f}× what rounding explains"
    except Exception as failure:  # a compiler or a driver may fail in any way
        problem = f"{type(failure).__name__}: {next(iter(str(failure).strip().splitlines()), '')}"[:300]
    if problem is None:
        for module in denoiser.modules():
            if isinstance(module, RowMaths):
                module.kernels = kernels
        return chosen
    if chosen.value == "compiled":
        raise Unsupported(
            f"enable_torch_compile = True: {problem}; it needs a C++ compiler that torch finds, such as g++",
            param="enable_torch_compile",
        )
    if options.fused_kernels == "on":
        raise Unsupported(f"fused_kernels = 'on': {problem}; use 'auto' or 'off'", param="fused_kernels")
    logger.warning("fused kernels are off: %s", problem)
    return Choice("plain", f"Triton's kernels failed their trial: {problem}")


def _row_kernels(name: str) -> RowKernels:
    """Imported only where chosen: Triton may be missing, and inductor takes a second."""
    if name == "triton":
        from stepwell.ops.kernels.rows import KERNELS

        return KERNELS
    from stepwell.ops.compiled import compiled_kernels

    return compiled_kernels()


def packing_line(row_bound: list[str], plan: Plan) -> tuple[str, str, str]:
    """What `doctor` says of it."""
    if plan.device.value != "cpu":
        return "packed_steps", "on", "GPU kernels promise no bits, alone or in company"
    if not row_bound:
        return "packed_steps", "on", "a row's bits do not depend on its neighbours here, tried on this model's layers"
    why = f"{plan.dit_precision.value} matmuls of this CPU sum in an order that depends on the number of rows"
    return "packed_steps", f"on, {len(row_bound)} linears sample by sample", why


# -------------------------------------------------------------------------------------------------------------- parts
def _load_parts(options: EngineOptions, repository: Repository, spec: ModelSpec, plan: Plan) -> dict[str, Any]:
    device = plan.device.value
    precisions = iter(plan.text_encoder_precisions)
    loaded: dict[str, Any] = {}
    for name, part in spec.parts.items():
        if part.kind == "tokenizer":
            loaded[name] = parts.load_tokenizer(repository, part)
        elif part.kind == "scheduler":
            loaded[name] = parts.load_schedule(repository, part)
        elif part.kind == "text_encoder":
            loaded[name] = parts.load_text_encoder(repository, part, DTYPES[next(precisions).value], device)
        elif part.kind == "vae":
            loaded[name] = _load_vae(options, repository, spec, plan)
    return loaded


def _load_vae(options: EngineOptions, repository: Repository, spec: ModelSpec, plan: Plan) -> Any:
    part = spec.parts["vae"]
    folder = repository.path / part.folder
    if options.vae_path is not None:
        root = locate(options.vae_path, "vae_path")
        folder = root / part.folder if (root / part.folder / "config.json").is_file() else root
    config = options.vae_config
    vae = parts.load_vae(folder, part, config, DTYPES[plan.vae_precision.value], plan.device.value)
    expected = int(repository.denoiser_config.get("in_channels", 64)) // 4
    channels = int(vae.config.latent_channels)
    if channels != expected:
        raise WeightsError(
            f"{folder}: the VAE has {channels} latent channels, the transformer takes {expected}", param="vae_path"
        )
    if options.vae_tiling:
        vae.enable_tiling()
        parts.set_tile_size(vae, config)
    elif config.tile_sample_min_height is not None or config.tile_sample_min_width is not None:
        logger.warning("vae_config's tile sizes do not apply: vae_tiling is off")
    if options.vae_slicing:
        vae.enable_slicing()
        if plan.device.value == "cpu":
            logger.warning("vae_slicing changes nothing on a CPU: pictures are decoded one at a time there anyway")
    return vae


# --------------------------------------------------------------------------------------------------------------- info
def _info(options: EngineOptions, repository: Repository, spec: ModelSpec, plan: Plan, pipeline: Pipeline) -> ModelInfo:
    limits = replace(spec.limits, multiple=pipeline.size_multiple, min_side=pipeline.size_multiple)
    return ModelInfo(
        id=options.model_path,
        path=str(repository.path),
        family=spec.family,
        pipeline_class=spec.pipeline_class,
        tasks=tasks_of(spec, options),
        defaults=checkpoint_defaults(spec.defaults, repository.defaults),
        limits=limits,
        dit_precision=plan.dit_precision.value,
        vae_precision=plan.vae_precision.value,
        text_encoder_precisions=tuple(choice.value for choice in plan.text_encoder_precisions),
        has_guidance=spec.has_guidance,
    )


def tasks_of(spec: ModelSpec, options: EngineOptions) -> tuple[Task, ...]:
    """What the model does with the parts that were loaded."""
    return tuple(task for task in spec.tasks if task is not Task.IMAGE_TO_IMAGE or options.vae_config.load_encoder)


def checkpoint_defaults(family: SamplingParams, own: Mapping[str, Any]) -> SamplingParams:
    """The family's defaults, overridden by those a checkpoint ships in generation_config.json."""
    known = {field.name for field in fields(SamplingParams)}
    for name in own.keys() - known:
        raise WeightsError(f"generation_config.json holds {name!r}; known are {', '.join(sorted(known))}", param=name)
    return replace(family, **own)

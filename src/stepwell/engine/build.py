"""From options to a worker: the one place that knows every part and the order of the passes.

meta build → load weights, quantised as they come → attention kernels → CPU linears → row order → row kernels → offload
→ step cache → stages. A pass gets a plain finished module and changes it at one of the four seams (`ops.Linear`,
`ops.Attention`, `ops.RowMaths`, `ops.Blocks`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from stepwell.cache import runner as step_cache
from stepwell.cache.params import cache_of, complete_cache, defaults_of
from stepwell.config.hardware import Hardware
from stepwell.config.resolve import Plan, resolve
from stepwell.config.schema import EngineOptions
from stepwell.engine import measure
from stepwell.engine.build_text import build_text_worker
from stepwell.engine.kernels import AttentionPass, Shape
from stepwell.engine.memory import fitting
from stepwell.engine.residency import open_home, placing, share_device, stream_blocks
from stepwell.engine.row_kernels import set_row_kernels
from stepwell.engine.steps import StepExecutor
from stepwell.engine.trace import TraceSettings, TracingWorker
from stepwell.engine.worker import Worker, WorkerSettings
from stepwell.errors import StepwellError, WeightsError
from stepwell.models import find_spec, parts, text_architecture
from stepwell.models.checkpoints import denoiser_source
from stepwell.models.spec import ModelSpec
from stepwell.offload.layers import Streamed
from stepwell.ops.blocks import Blocks
from stepwell.ops.linear import BySegment, Linear, PackedLinear, is_row_invariant
from stepwell.profiling.trace import open_folder
from stepwell.quant.schemes import SCHEMES, layers_for, quantiser
from stepwell.stages.base import Pipeline, StageSettings
from stepwell.types import CacheParams, ModelInfo, SamplingParams, Task
from stepwell.weights.hub import locate
from stepwell.weights.reader import load_weights
from stepwell.weights.repository import Repository, open_repository, read_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
logger = logging.getLogger(__name__)
Convert = Callable[[nn.Linear], nn.Module]


def build_worker(options: EngineOptions) -> StepExecutor:
    """Load a model and make it ready to step. Raises StepwellError naming the option or file at fault."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tracing = trace_settings(options)
    try:
        worker = _build(options)
        return worker if tracing is None else TracingWorker(worker, tracing)
    except StepwellError:
        raise
    except Exception as error:  # a repository can be odd in more ways than anybody lists
        logger.debug("loading failed", exc_info=error)
        text = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{options.model_path!r} can't be loaded: {type(error).__name__}: {text}", param="model_path"
        ) from error


def trace_settings(options: EngineOptions) -> TraceSettings | None:
    """How to trace, if that is asked for; says what of it does not apply."""
    given = options.model_fields_set
    if not options.profile:
        if "num_profiled_timesteps" in given:
            logger.warning("num_profiled_timesteps does not apply: profile is off")
        if options.profile_all_stages:
            logger.warning("profile_all_stages does not apply: profile is off")
        return None
    if options.profile_all_stages and "num_profiled_timesteps" in given:
        logger.warning("num_profiled_timesteps does not apply: profile_all_stages records every step")
    return TraceSettings(open_folder(), options.num_profiled_timesteps, options.profile_all_stages)


def _build(options: EngineOptions) -> Worker:
    folder = locate(options.model_path)
    architecture = text_architecture(folder)
    if architecture is not None:
        return build_text_worker(options, folder, architecture)
    for name in sorted(options.model_fields_set & {"dllm_algorithm", "dllm_algorithm_config", "kv_cache_mb"}):
        logger.warning("%s does not apply: %s makes no text", name, options.model_path)
    repository = open_repository(options.model_path)
    spec = find_spec(repository)
    denoisers = meta_denoisers(repository, spec)
    plan = make_plan(options, repository, spec, denoisers)
    attention = {name: attention_pass(options, repository, plan, denoiser) for name, denoiser in denoisers.items()}
    if "not apply" in plan.offload.reason:
        logger.warning("%s", plan.offload.reason)
    row_bound = find_row_bound(next(iter(denoisers.values())), plan)
    streamed = {}
    for name, denoiser in denoisers.items():
        streamed[name] = _load_denoiser(options, repository, spec, plan, name, denoiser, attention[name], row_bound)
    loaded = {**_load_parts(options, repository, spec, plan), **denoisers}
    pipeline = spec.pipeline(loaded, StageSettings(options.prompt_cache_mb * 2**20, spec.teacache, repository.index))
    choices = (*plan.lines(), packing_line(row_bound, plan), *warmup_line(options))
    residency = share_device(loaded, streamed, spec, plan, pin=options.pin_cpu_memory)
    settings = WorkerSettings(int(plan.batch_tokens.value), options.threads, plan.device.value, residency, choices)
    info = _info(options, repository, spec, plan, pipeline, count_blocks(denoisers["transformer"]))
    heads, head_dim = _attention_shape(repository)
    assert pipeline.latents is not None
    fits = fitting(
        info.limits, loaded["vae"], pipeline.latents, heads * head_dim, tiled=options.vae_tiling, device=plan.device.value
    )
    return Worker(replace(info, limits=fits), pipeline, settings)


def meta_denoisers(repository: Repository, spec: ModelSpec) -> dict[str, nn.Module]:
    """The denoisers of a repository by the name of their part, without weights. Some models have two."""
    with torch.device("meta"):
        return {
            name: spec.build_denoiser(read_config(repository.path / part.folder)[0])
            for name, part in spec.parts.items()
            if part.kind.startswith("dit") and (not part.is_optional or repository.has(name))
        }


def _load_denoiser(  # noqa: PLR0913
    options: EngineOptions, repository: Repository, spec: ModelSpec, plan: Plan, name: str, denoiser: nn.Module,
    attention: AttentionPass, row_bound: list[str],
) -> list[Streamed]:  # fmt: skip
    """Every pass over one denoiser, in order; returns what fetches its blocks, if they are offloaded."""
    part, dtype = spec.parts[name], DTYPES[plan.dit_precision.value]
    source = denoiser_source(repository, spec, part, options.transformer_path if name == "transformer" else None)
    key_map = spec.key_map(read_config(repository.path / part.folder)[0])
    scheme = SCHEMES.get(plan.quantization.value)
    home = open_home(options, plan)
    place = placing(denoiser, plan, home, layers_for(denoiser, scheme))
    load_weights(denoiser, source, key_map, dtype, place, quantiser(denoiser, scheme), spec.unused)
    denoiser.eval()
    attention.apply(denoiser)
    if plan.linear.value == "packed":
        pack_linears(denoiser)
    split_linears(denoiser, row_bound)
    set_row_kernels(denoiser, plan, _attention_shape(repository), dtype)
    streamed = stream_blocks(denoiser, home)
    step_cache.attach(denoiser)
    return streamed


def make_plan(options: EngineOptions, repository: Repository, spec: ModelSpec, denoisers: Mapping[str, nn.Module]) -> Plan:
    """Measure what matters for this model on this machine, then decide."""
    hardware = measure.detect()
    parameters = [sum(p.numel() for p in denoiser.parameters()) for denoiser in denoisers.values()]
    encoders = sum(part.kind == "text_encoder" for part in spec.parts.values())

    def plan(with_hardware: Hardware) -> Plan:
        return resolve(
            options, parameters=max(parameters), weights=sum(parameters), text_encoders=encoders, hardware=with_hardware
        )

    first = plan(hardware)
    if first.device.value != "cpu":
        return first
    heads, head_dim = _attention_shape(repository)
    return plan(measure.measure_cpu(hardware, first.dit_precision.value, heads * head_dim, heads, head_dim))


def attention_pass(options: EngineOptions, repository: Repository, plan: Plan, denoiser: nn.Module) -> AttentionPass:
    """Attention seam: the kernel of every attention layer, chosen and checked; the denoiser may be on the meta device."""
    heads, head_dim = _attention_shape(repository)
    return AttentionPass.of(options, plan, denoiser, Shape(heads, head_dim), measure.detect())


def _attention_shape(repository: Repository) -> tuple[int, int]:
    config = repository.denoiser_config
    return int(config.get("num_attention_heads", 24)), int(config.get("attention_head_dim", 128))


# ------------------------------------------------------------------------------------------------------------- passes
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
    dtype, scheme = DTYPES[plan.dit_precision.value], SCHEMES.get(plan.quantization.value)
    convert: Convert = PackedLinear if plan.linear.value == "packed" else _unchanged
    becomes = {name: scheme.convert for name in layers_for(denoiser, scheme)} if scheme else {}
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, Linear)}
    kinds = {name: (*_shape(layer), becomes.get(name, convert)) for name, layer in layers.items()}
    probes = {kinds[name]: layer for name, layer in layers.items()}
    bound = {kind for kind, layer in probes.items() if not is_row_invariant(layer, dtype, kind[-1])}
    return [name for name in layers if kinds[name] in bound]


def _shape(layer: nn.Linear) -> tuple[int, int, type[nn.Linear]]:
    return layer.in_features, layer.out_features, type(layer)


def _unchanged(layer: nn.Linear) -> nn.Module:
    return layer


def split_linears(denoiser: nn.Module, names: list[str]) -> None:
    """Linear seam: run these layers sequence by sequence."""
    for name in names:
        denoiser.set_submodule(name, BySegment(denoiser.get_submodule(name)))


def warmup_line(options: EngineOptions) -> list[tuple[str, str, str]]:
    """What `doctor` says of it, if it was asked for."""
    if not options.warmup_sizes:
        return []
    return [("warmup_sizes", ", ".join(options.warmup_sizes), "one step of each is made before requests are taken")]


def packing_line(row_bound: list[str], plan: Plan) -> tuple[str, str, str]:
    """What `doctor` says of it."""
    if plan.device.value != "cpu":
        return "packed_steps", "on", "GPU kernels promise no bits, alone or in company"
    if not row_bound:
        return "packed_steps", "on", "a row's bits do not depend on its neighbours here, tried on this model's layers"
    why = f"{plan.dit_precision.value} matmuls of this CPU sum in an order that depends on the number of rows"
    return "packed_steps", f"on, {len(row_bound)} linears sample by sample", why


def count_blocks(denoiser: nn.Module) -> int:
    return sum(len(module) for module in denoiser.modules() if isinstance(module, Blocks))


# -------------------------------------------------------------------------------------------------------------- parts
def _load_parts(options: EngineOptions, repository: Repository, spec: ModelSpec, plan: Plan) -> dict[str, Any]:
    device = plan.device.value
    precisions = iter(plan.text_encoder_precisions)
    attention = {component: choice.value for component, choice in plan.attention_parts}
    loaded: dict[str, Any] = {}
    for name, part in spec.parts.items():
        if part.is_optional and not repository.has(name):
            continue
        if part.kind in ("tokenizer", "image_processor"):
            loaded[name] = parts.load_processor(repository, part)
        elif part.kind == "scheduler":
            loaded[name] = parts.load_schedule(repository, part)
        elif part.kind in ("text_encoder", "image_encoder"):
            is_text = part.kind == "text_encoder"
            precision = next(precisions) if is_text else plan.vae_precision
            where = "cpu" if part.kind in plan.offloaded else device
            loaded[name] = parts.load_encoder(repository, part, DTYPES[precision.value], where, attention.get(name))
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
    expected = spec.latent_channels(repository.denoiser_config)
    channels = int(vae.config.z_dim if "z_dim" in vae.config else vae.config.latent_channels)
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
def _info(
    options: EngineOptions, repository: Repository, spec: ModelSpec, plan: Plan, pipeline: Pipeline, blocks: int
) -> ModelInfo:
    assert pipeline.latents is not None
    multiple, frame_multiple = pipeline.latents.multiple, pipeline.latents.frame_multiple
    limits = replace(spec.limits, multiple=multiple, min_side=multiple, frame_multiple=frame_multiple)
    info = ModelInfo(
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
        has_guidance_2=spec.has_guidance_2,
        cfg_field=spec.cfg_field,
        blocks=blocks,
        has_teacache=bool(spec.teacache),
    )
    own = replace(info, defaults=replace(info.defaults, cache=_own_cache(info)))
    return replace(own, defaults=replace(own.defaults, cache=defaults_of(options, own)))


def tasks_of(spec: ModelSpec, options: EngineOptions) -> tuple[Task, ...]:
    """What the model does with the parts that were loaded."""
    return tuple(task for task in spec.tasks if not task.takes_image or options.vae_config.load_encoder)


def checkpoint_defaults(family: SamplingParams, own: Mapping[str, Any]) -> SamplingParams:
    """The family's defaults, overridden by those a checkpoint ships in generation_config.json."""
    known = {field.name for field in fields(SamplingParams)}
    for name in own.keys() - known:
        raise WeightsError(f"generation_config.json holds {name!r}; known are {', '.join(sorted(known))}", param=name)
    return replace(family, **own)


def _own_cache(model: ModelInfo) -> CacheParams:
    """The step cache of a checkpoint's generation_config.json, completed and checked."""
    try:
        cache = model.defaults.cache
        asked = None if cache is None else cache_of(cache)
        return complete_cache(asked, replace(model, defaults=replace(model.defaults, cache=None)))
    except StepwellError as error:
        raise WeightsError(f"generation_config.json: {error.message}", param=error.param) from None

"""From options to a worker: the one place that knows every part and the order of the passes.

meta build → load weights, quantised as they come → attention kernels, over teams of ranks → CPU linears → row order
→ row kernels → offload → step cache → stages. A pass gets a plain finished module and changes it at one of the four seams
(`ops.Linear`, `ops.Attention`, `ops.RowMaths`, `ops.Blocks`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec import msgpack
from torch import nn

from stepwell.cache import runner as step_cache
from stepwell.cache.params import cache_of, complete_cache, defaults_of
from stepwell.config.attention import Shape, Site
from stepwell.config.hardware import Hardware
from stepwell.config.load import Place, torchrun_place
from stepwell.config.resolve import Plan, resolve
from stepwell.config.schema import EngineOptions
from stepwell.config.sequence import check_kind
from stepwell.engine import measure
from stepwell.engine.build_text import build_text_worker, draft_text
from stepwell.engine.checkpoints import open_checkpoints
from stepwell.engine.fleet import fleet
from stepwell.engine.kernels import AttentionPass, find_broken
from stepwell.engine.memory import fitting
from stepwell.engine.ranks import Leader, gather, ranked, ranks_line
from stepwell.engine.residency import open_home, placing, share_device, stream_blocks
from stepwell.engine.row_kernels import set_row_kernels
from stepwell.engine.steps import StepExecutor
from stepwell.engine.trace import TracingWorker, trace_settings
from stepwell.engine.warmup import requests as warm_up_requests
from stepwell.engine.warmup import warm_up
from stepwell.engine.worker import Worker, WorkerSettings
from stepwell.errors import StepwellError, Unsupported, WeightsError, WorkerLost
from stepwell.models import find_spec, parts, text_architecture
from stepwell.models.checkpoints import denoiser_source
from stepwell.models.spec import ModelSpec, Part
from stepwell.offload.homes import Home
from stepwell.offload.layers import Streamed
from stepwell.ops.blocks import Blocks
from stepwell.ops.linear import BySegment, Linear, PackedLinear, is_row_invariant
from stepwell.parallel.group import Lost
from stepwell.parallel.ranks import ALONE, Ranks
from stepwell.parallel.sequence import spread
from stepwell.parallel.team import Team
from stepwell.quant.schemes import SCHEMES, layers_for, quantiser
from stepwell.stages.base import StageSettings
from stepwell.stages.latents import Latents
from stepwell.types import CacheParams, ModelInfo, SamplingParams, Task
from stepwell.weights.hub import locate
from stepwell.weights.reader import load_weights
from stepwell.weights.repository import Repository, open_repository, read_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
logger = logging.getLogger(__name__)
Convert = Callable[[nn.Linear], nn.Module]


def build_worker(options: EngineOptions) -> StepExecutor:
    """Load every model, make it ready to step, and warm it up: here, and in the other ranks there are to be. Raises
    StepwellError naming the option or file at fault, and of several models which one."""
    tracing = trace_settings(options)
    if options.trust_remote_code:
        logger.warning("trust_remote_code has no effect: no code of a repository is run")
    place = torchrun_place()
    options = ranked(options, place)
    worker = assemble(options, ALONE) if options.num_gpus == 1 else _build_ranks(options, place)
    try:
        warm_up(worker, options.warmup_sizes)
    except BaseException:
        worker.close()
        raise
    return worker if tracing is None else TracingWorker(worker, tracing)


def _build_ranks(options: EngineOptions, place: Place | None) -> StepExecutor:
    """`build_worker`'s of several ranks, of which this is the first."""
    for path in options.model_paths:
        with _naming(options, path):
            report(options, path)  # what can't be is said here once, before there are others to say it too
    company = gather(options, place)
    try:
        return Leader(assemble(options, company.ranks), company)
    except Lost as error:
        company.abandon()
        raise WorkerLost(f"num_gpus = {options.num_gpus}: another rank could not load the model and says why above") from error
    except BaseException:
        company.abandon()
        raise


def assemble(options: EngineOptions, ranks: Ranks) -> StepExecutor:
    """One rank's own worker, of all models; every rank makes its own at the same time."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded: dict[str, Callable[[], Worker]] = {}
    for path in options.model_paths:
        with _naming(options, path):
            loaded[path] = _build(options, path, ranks)
    made: dict[str, Worker] = {}
    for path in sorted(loaded, key=lambda path: text_architecture(locate(path)) is None):  # what fits is asked once all are in
        with _naming(options, path):
            made[path] = loaded[path]()
    return fleet([made[path] for path in options.model_paths])


@contextmanager
def _naming(options: EngineOptions, path: str) -> Iterator[None]:
    """Around the loading of one model: every error is a StepwellError, and says of which of several."""
    try:
        yield
    except StepwellError as error:
        if len(options.model_paths) == 1:
            raise
        raise type(error)(f"{path}: {error.message}", param=error.param) from error
    except Exception as error:  # a repository can be odd in more ways than anybody lists
        logger.debug("loading failed", exc_info=error)
        text = " ".join(str(error).split())[:300]
        raise WeightsError(f"{path!r} can't be loaded: {type(error).__name__}: {text}", param="model_path") from error


@dataclass(frozen=True, slots=True)
class Draft:
    """A model before its weights are read: all that is decided, and nothing that a start would refuse.

    denoisers: by the name of their part, on the meta device; some models have two. home: where their blocks rest, if they are
    to be fetched one by one. row_bound: the linears that run sequence by sequence.
    """

    options: EngineOptions
    repository: Repository
    spec: ModelSpec
    hardware: Hardware
    shape: Shape
    denoisers: Mapping[str, nn.Module]
    plan: Plan
    attention: Mapping[str, AttentionPass]
    latents: Latents
    info: ModelInfo
    home: Home | None
    row_bound: list[str]

    def lines(self) -> list[tuple[str, str, str]]:
        """(what, value, reason) for people."""
        lines = [*self.plan.lines(), packing_line(self.row_bound, self.plan), cache_line(self.info, self.options)]
        if self.options.num_gpus > 1:
            lines.append(ranks_line(self.options))
        if self.options.warmup_sizes:
            lines.append(
                ("warmup_sizes", ", ".join(self.options.warmup_sizes), "one step of each is made before requests are taken")
            )
        return lines


def draft(options: EngineOptions, path: str, ranks: Ranks = ALONE) -> Draft:
    """Decide all that can be without reading weights. Raises StepwellError for what can't be."""
    repository = open_repository(path)
    spec = find_spec(repository)
    if options.vae_sp and not spec.tasks[0].makes_video:
        raise Unsupported("vae_sp = True: it spreads videos only, pictures are decoded by the first rank", param="vae_sp")
    denoisers = _meta_denoisers(repository, spec)
    denoiser = next(iter(denoisers.values()))  # two of a model are alike
    shape = _attention_shape(repository, spec)
    plan, hardware = _make_plan(options, spec, denoisers, shape, ranks)
    attention = {name: AttentionPass.of(options, plan, module, shape, hardware) for name, module in denoisers.items()}
    latents = _read_latents(options, repository, spec)
    info = _info(options, repository, spec, plan, denoiser, latents)
    warm_up_requests(options.warmup_sizes, info)
    home, row_bound = open_home(options, plan), find_row_bound(denoiser, plan)
    return Draft(options, repository, spec, hardware, shape, denoisers, plan, attention, latents, info, home, row_bound)


@dataclass(frozen=True, slots=True)
class Report:
    """What `stepwell doctor` tells of a model. site: what attention backends are asked for, where there is a choice."""

    kind: str
    hardware: Hardware
    parameters: int
    lines: list[tuple[str, str, str]]
    site: Site | None


def report(options: EngineOptions, path: str) -> Report:
    """How a model would run, and refuses what a start would."""
    folder = locate(path)
    architecture = text_architecture(folder)
    options = ranked(options, None)
    check_kind(options, architecture)
    if architecture is not None:
        text = draft_text(options, folder, architecture)
        pages = text.pages()
        text.codec(pages)
        return Report(architecture, text.hardware, text.parameters, text.lines(pages), None)
    made = draft(options, path)
    plan = made.plan
    site = Site(plan.device.value, plan.dit_precision.value, made.hardware, made.shape)
    return Report(made.spec.name, made.hardware, count_parameters(made.denoisers["transformer"]), made.lines(), site)


def _build(options: EngineOptions, path: str, ranks: Ranks) -> Callable[[], Worker]:
    """Load one model; what is left to do once all are, which for text is everything, as its pages take what memory is free."""
    folder = locate(path)
    architecture = text_architecture(folder)
    if architecture is not None:
        return partial(build_text_worker, options, folder, architecture, path, ranks)
    for name in sorted(options.model_fields_set & {"dllm_algorithm", "dllm_algorithm_config", "kv_cache_mb"}):
        logger.warning("%s does not apply: %s makes no text", name, path)
    made = draft(options, path, ranks)
    parameters = max(map(count_parameters, made.denoisers.values()))  # passes turn some into other things
    repository, spec, plan = made.repository, made.spec, made.plan
    if plan.offload.is_warning:
        logger.warning("%s", plan.offload.reason)
    streamed = {name: _load_denoiser(made, name, ranks.team) for name in made.denoisers}
    loaded = {**_load_parts(options, repository, spec, plan), **made.denoisers}
    stages = spec.pipeline(
        loaded,
        StageSettings(
            options.prompt_cache_mb * 2**20, spec.teacache, repository.index, ranks, ranks if options.vae_sp else ALONE
        ),
    )
    residency = share_device(loaded, streamed, spec, plan, pin=options.pin_cpu_memory)
    device, lines = plan.device.value, tuple(made.lines())
    checkpoints = open_checkpoints(options, plan, repository.path, stages) if ranks.size == 1 else None
    settings = WorkerSettings(int(plan.batch_tokens.value), options.threads, device, residency, lines, checkpoints, ranks)
    width, vae = made.shape.heads * made.shape.head_dim, loaded["vae"]

    def finish() -> Worker:
        fits = fitting(made.info.limits, vae, made.latents, width, tiled=options.vae_tiling, device=device)
        return Worker(replace(made.info, limits=fits, parameters=parameters), stages, settings)

    return finish


def _meta_denoisers(repository: Repository, spec: ModelSpec) -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            name: spec.build_denoiser(read_config(repository.path / part.folder)[0])
            for name, part in spec.parts.items()
            if part.kind.startswith("dit") and (not part.is_optional or repository.has(name))
        }


def _load_denoiser(made: Draft, name: str, team: Team) -> list[Streamed]:
    """Every pass over one denoiser, in order; returns what fetches its blocks, if they are offloaded."""
    options, repository, spec, plan, denoiser = made.options, made.repository, made.spec, made.plan, made.denoisers[name]
    part, dtype = spec.parts[name], DTYPES[plan.dit_precision.value]
    source = denoiser_source(repository, spec, part, options.transformer_path if name == "transformer" else None)
    key_map = spec.key_map(read_config(repository.path / part.folder)[0])
    scheme = SCHEMES.get(plan.quantization.value)
    place = placing(denoiser, plan, made.home, layers_for(denoiser, scheme))
    load_weights(denoiser, source, key_map, dtype, place, quantiser(denoiser, scheme), spec.unused)
    denoiser.eval()
    made.attention[name].apply(denoiser)
    spread(denoiser, team)
    if plan.linear.value == "packed":
        pack_linears(denoiser)
    split_linears(denoiser, made.row_bound)
    set_row_kernels(denoiser, plan, (made.shape.heads, made.shape.head_dim), dtype)
    streamed = stream_blocks(denoiser, made.home)
    step_cache.attach(denoiser, team.mean)
    return streamed


def _make_plan(
    options: EngineOptions, spec: ModelSpec, denoisers: Mapping[str, nn.Module], shape: Shape, ranks: Ranks
) -> tuple[Plan, Hardware]:
    """Measure what matters for this model on this machine, then decide: the plan, and what is known of the machine now. Ranks
    decide alike, by what the first one measured."""
    hardware = measure.detect()
    parameters = [count_parameters(denoiser) for denoiser in denoisers.values()]
    encoders = sum(part.kind == "text_encoder" for part in spec.parts.values())

    def plan(with_hardware: Hardware) -> Plan:
        most, weights = max(parameters), sum(parameters)
        return resolve(options, parameters=most, text_encoders=encoders, hardware=with_hardware, shape=shape, weights=weights)

    first = plan(hardware)
    while broken := find_broken(first, hardware):  # what was named is refused then, and `auto` takes the next best
        hardware = replace(hardware, broken={**hardware.broken, **broken})
        first = plan(hardware)
    if first.device.value != "cpu":
        return first, hardware
    width = shape.heads * shape.head_dim
    hardware = measure.measure_cpu(hardware, first.dit_precision.value, width, shape.heads, shape.head_dim)
    measured = msgpack.decode(ranks.first(msgpack.encode(dict(hardware.measured))), type=dict[str, float])
    hardware = replace(hardware, measured=measured)
    return plan(hardware), hardware


def _attention_shape(repository: Repository, spec: ModelSpec) -> Shape:
    config = repository.denoiser_config
    heads, head_dim = int(config.get("num_attention_heads", 24)), int(config.get("attention_head_dim", 128))
    return Shape(heads, head_dim, frozenset(spec.vendor_patterns))


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


def cache_line(model: ModelInfo, options: EngineOptions) -> tuple[str, str, str]:
    """What `doctor` says of it."""
    cache = model.defaults.cache
    assert cache is not None and cache.method is not None
    if cache.method == "none":
        others = "dbcache, first_block or teacache" if model.has_teacache else "dbcache or first_block"
        return "step_cache", "none", f"none was asked for; a request may bring {others}"
    values = ", ".join(f"{name} {value}" for name, value in list(asdict(cache).items())[1:] if value is not None)
    whose = "as asked" if options.cache_method or options.cache_dit_enabled else "the checkpoint's own"
    return "step_cache", cache.method, f"{whose}, unless a request brings its own: {values}"


def packing_line(row_bound: list[str], plan: Plan) -> tuple[str, str, str]:
    """What `doctor` says of it."""
    if plan.device.value != "cpu":
        return "packed_steps", "on", "GPU kernels promise no bits, alone or in company"
    if not row_bound:
        return "packed_steps", "on", "a row's bits do not depend on its neighbours here, tried on this model's layers"
    why = f"{plan.dit_precision.value} matmuls of this CPU sum in an order that depends on the number of rows"
    return "packed_steps", f"on, {len(row_bound)} linears sample by sample", why


def count_parameters(denoiser: nn.Module) -> int:
    return sum(parameter.numel() for parameter in denoiser.parameters())


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
            loaded[name] = _load_vae(options, repository, part, plan)
    return loaded


def _vae_folder(options: EngineOptions, repository: Repository, part: Part) -> Path:
    if options.vae_path is None:
        return repository.path / part.folder
    root = locate(options.vae_path, "vae_path")
    return root / part.folder if (root / part.folder / "config.json").is_file() else root


def _load_vae(options: EngineOptions, repository: Repository, part: Part, plan: Plan) -> Any:
    folder, config = _vae_folder(options, repository, part), options.vae_config
    vae = parts.load_vae(folder, part, config, DTYPES[plan.vae_precision.value], plan.device.value)
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
def _read_latents(options: EngineOptions, repository: Repository, spec: ModelSpec) -> Latents:
    """How latents are laid out. Raises WeightsError for a VAE that does not say it, or is not this transformer's."""
    part = spec.parts["vae"]
    folder = _vae_folder(options, repository, part)
    config = parts.read_vae_config(folder, part)
    try:
        latents = spec.latents(repository.denoiser_config, config)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder / 'config.json'} is not a VAE's: {type(error).__name__}: {error}", param=part.folder
        ) from None
    channels = config.get("z_dim") or config.get("latent_channels")
    if channels != latents.channels:
        raise WeightsError(
            f"{folder}: the VAE has {channels} latent channels, the transformer takes {latents.channels}", param="vae_path"
        )
    return latents


def _info(
    options: EngineOptions, repository: Repository, spec: ModelSpec, plan: Plan, denoiser: nn.Module, latents: Latents
) -> ModelInfo:
    """What frontends may know of the model. Raises StepwellError for defaults it can't have."""
    multiple, frame_multiple = latents.multiple, latents.frame_multiple
    limits = replace(spec.limits, multiple=multiple, min_side=multiple, frame_multiple=frame_multiple)
    info = ModelInfo(
        id=repository.id,
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
        blocks=sum(len(module) for module in denoiser.modules() if isinstance(module, Blocks)),
        has_teacache=bool(spec.teacache),
    )
    own = replace(info, defaults=replace(info.defaults, cache=_own_cache(info)))
    return replace(own, defaults=replace(own.defaults, cache=defaults_of(options, own)))


def tasks_of(spec: ModelSpec, options: EngineOptions) -> tuple[Task, ...]:
    """What the model does with the parts that were loaded. Raises Unsupported if that is nothing."""
    tasks = tuple(task for task in spec.tasks if not task.takes_image or options.vae_config.load_encoder)
    if not tasks:
        raise Unsupported(
            f"vae_config: load_encoder = false, but {spec.name} always starts from a picture, which takes the VAE's encoder",
            param="vae_config",
        )
    return tasks


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

"""From options to a worker for a text model: a shorter order of the passes of `engine/build`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepwell.config.attention import Shape, Site, choose
from stepwell.config.choice import Choice
from stepwell.config.hardware import Hardware
from stepwell.config.load import read_file
from stepwell.config.resolve import Plan, resolve
from stepwell.config.schema import EngineOptions
from stepwell.engine import measure
from stepwell.engine.memory import free_bytes
from stepwell.engine.ranks import ranks_line
from stepwell.engine.worker import Worker, WorkerSettings
from stepwell.errors import InvalidRequest, Unsupported, WeightsError
from stepwell.models import TEXT_FAMILIES
from stepwell.models.block_causal import Attending, BlockCausal
from stepwell.models.parts import load_fast_tokenizer
from stepwell.offload.parts import Residency
from stepwell.ops.experts import Experts, OneDnnLinear
from stepwell.ops.linear import BySegment, Linear, PackedLinear, is_row_invariant
from stepwell.ops.spans import largest_difference
from stepwell.parallel.ranks import ALONE, Ranks
from stepwell.parallel.team import Team
from stepwell.samplers.unmask import ALGORITHMS, DEFAULT_ALGORITHM, algorithm_of, params_of
from stepwell.stages.prompts import EncodePrompt, Prompts
from stepwell.stages.tokens import Codec
from stepwell.stages.unmask import Schedule, TextSettings, Unmask
from stepwell.types import DiffusionParams, Limits, ModelInfo, SamplingParams, Task, TextInfo
from stepwell.weights.reader import Safetensors
from stepwell.weights.repository import read_json

DTYPES = {**measure.DTYPES, "fp16": torch.float16}
BATCH_TOKENS = 2048  # of a step: enough for the matrix units of a GPU, and no more than a long prompt should keep others waiting
MAX_TOKENS = 2048  # of a text whose request does not say
MASK_TOKENS, END_TOKENS = ("<|mask|>", "<|MASK|>"), ("<|role_end|>", "<|endoftext|>", "<|im_end|>")
SERVED = Schedule()
SDPA = Choice("torch_sdpa", "sequence by sequence")
POOL_BYTES, POOL_SHARE = 256 * 2**20, 0.3
REFUSED = (
    *("quantization", "transformer_path", "dit_layerwise_offload", "dit_cpu_offload", "component_attention_backends"),
    *("enable_torch_compile", "fused_kernels", "warmup_sizes"),
)
IDLE = ("cache_", "vae_", "text_encoder", "mask_strategy", "sliding_tile", "attention_sparsity", "prompt_cache_mb", "pin_cpu",
        "offload_path", "checkpoint_")  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextDraft:
    """A text model before its weights are read: all that is decided.

    page_bytes: of the keys and values of one block of `size` tokens. bound: the layers that run block by block.
    """

    options: EngineOptions
    folder: Path
    architecture: str
    size: int
    defaults: DiffusionParams
    config: Any
    source: Safetensors
    hardware: Hardware
    plan: Plan
    parameters: int
    attention: Choice
    page_bytes: int
    bound: list[str]

    @property
    def family(self) -> Any:
        return import_module(TEXT_FAMILIES[self.architecture])

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.plan.dit_precision.value]

    @property
    def batch_tokens(self) -> int:
        return max(self.size, self.options.max_batch_tokens or BATCH_TOKENS)

    def pages(self) -> int:
        """How many there is room for now."""
        most = math.ceil(self.config.max_position_embeddings / self.size)
        return pages(self.options, self.page_bytes, most, self.plan.device.value)

    def codec(self, pages: int) -> Codec:
        """The checkpoint's tokenizer, for texts that fit into so many pages."""
        context = min(self.config.max_position_embeddings // self.size, pages) * self.size
        return open_codec(self.folder, self.config.vocab_size, context)

    def lines(self, pages: int) -> list[tuple[str, str, str]]:
        """(what, value, reason) for people."""
        kept = f"blocks of {self.size} tokens whose keys and values are kept, {self.page_bytes} bytes each"
        packing = f"{len(self.bound)} linears block by block" if self.bound else "a row's bits do not depend on its neighbours"
        return [
            *(line for line in self.plan.lines() if line[0] in ("device", "dit_precision", "threads")),
            ("attention", self.attention.value, self.attention.reason),
            ("algorithm", self.defaults.algorithm or DEFAULT_ALGORITHM, "how blocks are filled; a request may choose another"),
            ("block_size", str(self.size), "tokens that are refined together"),
            ("kv_pages", str(pages), kept),
            ("batch_tokens", str(self.batch_tokens), "of a step; a longer prompt takes several"),
            ("packed_steps", "on", packing),
            *([ranks_line(self.options)] if self.options.num_gpus > 1 else []),
        ]


def draft_text(options: EngineOptions, folder: Path, architecture: str) -> TextDraft:
    """Decide all that can be without reading weights. Raises StepwellError for what can't be."""
    check_options(options)
    family: Any = import_module(TEXT_FAMILIES[architecture])
    size, defaults = algorithm_options(options, folder, family.BLOCK)
    config, source = family.read_config(read_json(folder / "config.json")), Safetensors(folder)
    if config.max_position_embeddings < size:
        room = config.max_position_embeddings
        raise InvalidRequest(f"block_size = {size}: the model's context is {room} tokens", param="dllm_algorithm_config")
    parameters = sum(parameter.numel() for parameter in family.outline(config, source).parameters())
    hardware = measure.detect()
    plan = resolve(options, parameters=parameters, text_encoders=0, hardware=hardware)
    model = family.outline(config, source, DTYPES[plan.dit_precision.value], Team(tensor=options.tp_size))
    bound = row_bound(model) if plan.device.value == "cpu" else []
    shape = Shape(model.key_heads, config.head, frozenset({"triton"}))
    attention = choose(options, Site(plan.device.value, plan.dit_precision.value, hardware, shape), SDPA)
    return TextDraft(
        options, folder, architecture, size, defaults, config, source, hardware, plan, parameters, attention,
        model.page_bytes(size), bound,
    )  # fmt: skip


def build_text_worker(
    options: EngineOptions, folder: Path, architecture: str, name: str, ranks: Ranks = ALONE, schedule: Schedule = SERVED
) -> Worker:  # fmt: skip
    """Load this rank's part of a text model, served as `name`, and make it ready to step. Raises StepwellError naming the option
    or file at fault.

    schedule: another one than what is served, for benchmarks to compare with."""
    made = draft_text(options, folder, architecture)
    device, config, size = made.plan.device.value, made.config, made.size
    model = made.family.load(config, made.source, made.dtype, device, ranks.team)
    if device == "cpu":
        keep_bits(model, made.bound)
    if made.attention.value == "triton":
        take_triton(model, size)
    pool = model.pool(min(map(int, ranks.every(str(made.pages()).encode()))), size)  # all give up the same pages
    codec = made.codec(pool.pages)
    prompts = Prompts(codec, size, device)
    stage = Unmask(model, pool, prompts, TextSettings(size, made.batch_tokens, made.defaults, schedule, ranks.team))
    choices = tuple(made.lines(pool.pages))
    settings = WorkerSettings(made.batch_tokens, options.threads, device, Residency({}), choices, ranks=ranks)
    info = ModelInfo(
        id=name,
        path=str(folder),
        family=TEXT_FAMILIES[architecture].rpartition(".")[2],
        pipeline_class=architecture,
        tasks=(Task.TEXT_TO_TEXT,),
        defaults=SamplingParams(num_outputs=1),
        limits=Limits(max_prompt_chars=max(32_000, 16 * codec.context)),
        dit_precision=made.plan.dit_precision.value,
        vae_precision=made.plan.dit_precision.value,
        cfg_field=None,
        blocks=config.num_hidden_layers,
        text=TextInfo(config.vocab_size, size, codec.context, codec.max_tokens, made.defaults),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    return Worker(info, (EncodePrompt(prompts), stage), settings)


def check_options(options: EngineOptions) -> None:
    """Refuse what a text model can't do, and say what does not apply to it."""
    for name in sorted(options.model_fields_set):
        field, value = EngineOptions.model_fields[name], getattr(options, name)
        if value == field.default:
            continue
        only = {"attention_backend": ("auto", "torch_sdpa", "triton"), "diffusers_attention_backend": ("native",)}
        only |= {"linear_backend": ("auto", "packed")}
        if name in REFUSED or value not in only.get(name, (value,)):
            raise Unsupported(f"{name} = {value!r}: not for text models in this version; leave it out", param=name)
        if name.startswith(IDLE) and name != "checkpoint_path":  # which a server gives for the other models
            logger.warning("%s does not apply to a text model", name)


def algorithm_options(options: EngineOptions, folder: Path, block: int) -> tuple[int, DiffusionParams]:
    """The size of a block in tokens, `block` where nothing says, and how blocks are filled unless a request says otherwise."""
    given: dict[str, Any] = {}
    param = "dllm_algorithm_config"
    if options.dllm_algorithm not in (None, *ALGORITHMS):
        raise InvalidRequest(
            f"dllm_algorithm = {options.dllm_algorithm!r}: must be one of {', '.join(ALGORITHMS)}", param="dllm_algorithm"
        )
    if options.dllm_algorithm_config is not None:
        given = read_file(Path(options.dllm_algorithm_config))
    own = [read_json(folder / name) for name in ("config.json", "generation_config.json") if (folder / name).is_file()]
    size = given.pop("block_size", next((c[key] for c in own for key in ("block_size", "block_length") if key in c), block))
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 1024:
        raise InvalidRequest(f"block_size = {size!r}: must be an integer between 1 and 1024", param=param)
    if "algorithm" in given:
        raise InvalidRequest(f"{param}: the algorithm is the option dllm_algorithm", param=param)
    params = params_of({**given, "algorithm": options.dllm_algorithm}, param)
    algorithm_of(params, param)
    return size, params


def pages(options: EngineOptions, page_bytes: int, most: int, device: str) -> int:
    """How many pages the pool has. Unless told, it holds one text of full length, if that much memory is free."""
    if options.kv_cache_mb is not None:
        held = options.kv_cache_mb * 2**20
    else:
        free = free_bytes(device)
        held = min(max(POOL_BYTES, most * page_bytes), free // 2) if device == "cpu" else int(POOL_SHARE * free)
    if held < 2 * page_bytes:
        raise InvalidRequest(
            f"kv_cache_mb = {options.kv_cache_mb}: two blocks need {2 * page_bytes / 2**20:.1f} MiB", param="kv_cache_mb"
        )
    return held // page_bytes


def open_codec(folder: Path, vocabulary: int, context: int) -> Codec:
    """The checkpoint's tokenizer, its mask, and what ends a text."""
    tokenizer = load_fast_tokenizer(folder)
    known: Mapping[str, int] = tokenizer.get_vocab()
    if max(known.values(), default=-1) >= vocabulary:
        raise WeightsError(f"{folder}: the tokenizer has ids beyond config.json's vocab_size = {vocabulary}", param="vocab_size")
    own = [read_json(folder / name) for name in ("generation_config.json", "config.json") if (folder / name).is_file()]
    named = next((known[name] for name in MASK_TOKENS if name in known), tokenizer.mask_token_id)
    mask = next((c["mask_token_id"] for c in own if "mask_token_id" in c), named)
    if not isinstance(mask, int) or not 0 <= mask < vocabulary:
        raise WeightsError(f"{folder}: neither its tokenizer nor its config names a mask token", param="mask_token_id")
    named_ends = {known[name] for name in END_TOKENS if name in known} | {tokenizer.eos_token_id}
    told = (c.get("eos_token_id") for c in own)
    ends: list[Any] = [*named_ends, *(end for value in told for end in (value if isinstance(value, list) else [value]))]
    ends = [end for end in ends if end is not None]
    if wrong := [end for end in ends if not isinstance(end, int) or not 0 <= end < vocabulary]:
        raise WeightsError(
            f"{folder}: eos_token_id = {wrong[0]!r}: must be below vocab_size = {vocabulary}", param="eos_token_id"
        )
    lengths = (c.get("max_new_tokens") for c in own)
    most = next((length for length in lengths if isinstance(length, int) and length > 0), MAX_TOKENS)
    return Codec(tokenizer, mask, frozenset(ends), context, most, vocabulary)


def take_triton(model: BlockCausal, size: int) -> None:
    """Attention seam of texts: the Triton kernel, if it passes a trial. Raises Unsupported."""
    layers = [module for module in model.modules() if isinstance(module, Attending)]
    heads = (layers[0].heads, layers[0].key_heads)
    try:
        from stepwell.ops.kernels.spans import span_attention

        error = largest_difference(span_attention, heads, layers[0].head, size, model.norm.weight)
        problem = None if error <= 1 else f"its results differ from torch_sdpa's by {error:.1f}× what rounding explains"
    except Exception as failure:  # a compiler or a driver may fail in any way
        problem = f"{type(failure).__name__}: {next(iter(str(failure).strip().splitlines()), '')}"[:300]
    if problem is not None:
        raise Unsupported(f"attention_backend = 'triton': {problem}; use 'torch_sdpa'", param="attention_backend")
    for layer in layers:
        layer.kernel = span_attention


@torch.no_grad()
def row_bound(model: nn.Module) -> list[str]:
    """The layers whose kernels, on this CPU, sum in an order that depends on the number of rows: their names. `model` may be
    on the meta device."""
    probed: dict[tuple[object, ...], bool] = {}

    def is_bound(kind: type[nn.Module], shape: tuple[int, int], dtype: torch.dtype) -> bool:
        key = (kind, shape, dtype)
        if key not in probed:
            with torch.device("meta"):
                plain = Linear(*shape)
            probed[key] = not is_row_invariant(plain, dtype, kind)
        return probed[key]

    bound = []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and is_bound(PackedLinear, (module.in_features, module.out_features), module.weight.dtype):
            bound.append(name)
        elif isinstance(module, Experts):
            width = module.gate.shape[1]
            shapes = ((width, len(module.gate) // module.count), (module.down.shape[1], width))
            bound += [name] * any(is_bound(OneDnnLinear, shape, module.gate.dtype) for shape in shapes)
    return bound


@torch.no_grad()
def keep_bits(model: nn.Module, bound: Sequence[str]) -> None:
    """Linear seam, on a CPU: packed layers, and block by block those of `bound`. After this a row's bits depend neither on
    other requests nor on how its own text was cut into steps."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            packed: nn.Module = PackedLinear(module)
            model.set_submodule(name, BySegment(packed) if name in bound else packed)
        elif isinstance(module, Experts):
            module.by_block = name in bound

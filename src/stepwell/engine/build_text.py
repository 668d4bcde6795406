"""From options to a worker for a text model: a shorter order of the passes of `engine/build`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepwell.config.load import read_file
from stepwell.config.resolve import Plan, resolve
from stepwell.config.schema import EngineOptions
from stepwell.engine import measure
from stepwell.engine.memory import free_bytes
from stepwell.engine.worker import Worker, WorkerSettings
from stepwell.errors import InvalidRequest, Unsupported, WeightsError
from stepwell.models import TEXT_FAMILIES
from stepwell.models.parts import load_fast_tokenizer
from stepwell.offload.parts import Residency
from stepwell.ops.experts import Experts, OneDnnLinear
from stepwell.ops.linear import BySegment, Linear, PackedLinear, is_row_invariant
from stepwell.samplers.unmask import algorithm_of, params_of
from stepwell.stages.tokens import Codec, EncodePrompt, Prompts
from stepwell.stages.unmask import Schedule, TextSettings, Unmask
from stepwell.types import DiffusionParams, Limits, ModelInfo, SamplingParams, Task, TextInfo
from stepwell.weights.reader import Safetensors
from stepwell.weights.repository import read_json

DTYPES = {**measure.DTYPES, "fp16": torch.float16}
BATCH_TOKENS = 2048  # of a step: enough for the matrix units of a GPU, and no more than a long prompt should keep others waiting
MAX_TOKENS = 2048  # of a text whose request does not say
MASK_TOKENS, END_TOKENS = ("<|mask|>", "<|MASK|>"), ("<|role_end|>", "<|endoftext|>", "<|im_end|>")
SERVED = Schedule()
POOL_BYTES, POOL_SHARE = 256 * 2**20, 0.3
REFUSED = (
    *("quantization", "transformer_path", "dit_layerwise_offload", "dit_cpu_offload", "component_attention_backends"),
    *("enable_torch_compile", "fused_kernels", "warmup_sizes"),
)
IDLE = ("cache_", "vae_", "text_encoder", "mask_strategy", "sliding_tile", "attention_sparsity", "prompt_cache_mb", "pin_cpu",
        "offload_path", "checkpoint_")  # fmt: skip
logger = logging.getLogger(__name__)


def build_text_worker(options: EngineOptions, folder: Path, architecture: str, name: str, schedule: Schedule = SERVED) -> Worker:
    """Load a text model, served as `name`, and make it ready to step. Raises StepwellError naming the option or file at fault.

    schedule: another one than what is served, for benchmarks to compare with."""
    check_options(options)
    family: Any = import_module(TEXT_FAMILIES[architecture])
    size, defaults = algorithm_options(options, folder, family.BLOCK)
    config = family.read_config(read_json(folder / "config.json"))
    source = Safetensors(folder)
    plan = make_plan(options, family.parameters(config, source))
    device, dtype = plan.device.value, DTYPES[plan.dit_precision.value]
    model = family.load(config, source, dtype, device)
    bound = keep_bits(model, dtype) if device == "cpu" else []
    pool = model.pool(pages(options, model.page_bytes(size), math.ceil(config.max_position_embeddings / size), device), size)
    context = min(config.max_position_embeddings // size, pool.pages) * size
    codec = open_codec(folder, config.vocab_size, context)
    prompts = Prompts(codec)
    batch_tokens = max(size, options.max_batch_tokens or BATCH_TOKENS)
    stage = Unmask(model, pool, prompts, TextSettings(size, batch_tokens, defaults, schedule))
    text = TextInfo(config.vocab_size, size, context, codec.max_tokens, defaults)
    choices = (
        *(line for line in plan.lines() if line[0] in ("device", "dit_precision", "threads")),
        ("block_size", str(size), "tokens that are refined together"),
        (
            "kv_pages",
            str(pool.pages),
            f"blocks of {size} tokens whose keys and values are kept, {model.page_bytes(size)} bytes each",
        ),
        ("batch_tokens", str(batch_tokens), "of a step; a longer prompt takes several"),
        (
            "packed_steps",
            "on",
            f"{len(bound)} linears block by block" if bound else "a row's bits do not depend on its neighbours",
        ),
    )
    settings = WorkerSettings(batch_tokens, options.threads, device, Residency({}), choices)
    info = ModelInfo(
        id=name,
        path=str(folder),
        family=TEXT_FAMILIES[architecture].rpartition(".")[2],
        pipeline_class=architecture,
        tasks=(Task.TEXT_TO_TEXT,),
        defaults=SamplingParams(num_outputs=1),
        limits=Limits(max_prompt_chars=max(32_000, 16 * context)),
        dit_precision=plan.dit_precision.value,
        vae_precision=plan.dit_precision.value,
        cfg_field=None,
        blocks=config.num_hidden_layers,
        text=text,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    return Worker(info, (EncodePrompt(prompts), stage), settings)


def check_options(options: EngineOptions) -> None:
    """Refuse what a text model can't do, and say what does not apply to it."""
    for name in sorted(options.model_fields_set):
        field, value = EngineOptions.model_fields[name], getattr(options, name)
        if value == field.default:
            continue
        only = {"attention_backend": "torch_sdpa", "linear_backend": "packed"}
        if name in REFUSED or value != only.get(name, value):
            raise Unsupported(f"{name} = {value!r}: not for text models in this version; leave it out", param=name)
        if name.startswith(IDLE):
            logger.warning("%s does not apply to a text model", name)


def algorithm_options(options: EngineOptions, folder: Path, block: int) -> tuple[int, DiffusionParams]:
    """The size of a block in tokens, `block` where nothing says, and how blocks are filled unless a request says otherwise."""
    given: dict[str, Any] = {}
    param = "dllm_algorithm_config"
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


def make_plan(options: EngineOptions, parameters: int) -> Plan:
    return resolve(options, parameters=parameters, text_encoders=0, hardware=measure.detect())


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
    ends = {known[name] for name in END_TOKENS if name in known} | {tokenizer.eos_token_id}
    for value in (c.get("eos_token_id") for c in own):
        ends |= set(value) if isinstance(value, list) else {value}
    length = next((c["max_new_tokens"] for c in own if isinstance(c.get("max_new_tokens"), int)), MAX_TOKENS)
    return Codec(tokenizer, mask, frozenset(ends - {None}), context, length)


@torch.no_grad()
def keep_bits(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Linear seam, on a CPU: packed layers, and block by block what sums in an order that depends on the number of rows.

    Returns the names of the latter. After this a row's bits depend neither on other requests nor on how its own text was cut
    into steps.
    """
    probed: dict[tuple[object, ...], bool] = {}

    def is_bound(kind: type[nn.Module], shape: tuple[int, int], precision: torch.dtype) -> bool:
        key = (kind, shape, precision)
        if key not in probed:
            with torch.device("meta"):
                plain = Linear(*shape)
            probed[key] = not is_row_invariant(plain, precision, kind)
        return probed[key]

    bound = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            packed: nn.Module = PackedLinear(module)
            if is_bound(PackedLinear, (module.in_features, module.out_features), module.weight.dtype):
                packed = BySegment(packed)
                bound.append(name)
            model.set_submodule(name, packed)
        elif isinstance(module, Experts):
            width = module.gate.shape[1]
            shapes = ((width, len(module.gate) // module.count), (module.down.shape[1], width))
            module.by_block = any(is_bound(OneDnnLinear, shape, dtype) for shape in shapes)
            bound += [name] * module.by_block
    return bound

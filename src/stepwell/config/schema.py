"""Every option there is, once. Flags, config-file keys, environment variables, JSON schema and docs come from here.

An option whose feature is not in this version says so itself: `only` lists the values that work, `why` is the reason
any other is refused with. Nothing is parsed and dropped.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypedDict, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from stepwell import errors
from stepwell.types import SchedulingPolicy

Precision = Literal["fp32", "bf16", "fp16"]
CacheMethod = Literal["none", "dbcache", "first_block", "teacache"]
TileCount = Annotated[int, Field(ge=1, lt=2**16)]
_NO_LORA = "LoRA adapters are not in this version"
_NO_DIFFUSERS = "running vanilla diffusers pipelines is not in this version; see `stepwell models` for those that are native"


def option(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    env: tuple[str, ...] = (),
    only: tuple[Any, ...] | None = None,
    why: str | None = None,
    **limits: Any,
) -> Any:
    """A field of the schema. `env` lists variables read besides STEPWELL_<NAME>; `limits` go to pydantic's Field."""
    extra = Extra(aliases=list(aliases), env=list(env), only=None if only is None else list(only), why=why)
    return Field(default, description=help, json_schema_extra=cast(Any, extra), **limits)


class Extra(TypedDict):
    """What an option says of itself beyond its type: other spellings, other variables, and what works."""

    aliases: list[str]
    env: list[str]
    only: list[Any] | None
    why: str | None


def extra_of(field: FieldInfo) -> Extra:
    return cast(Extra, field.json_schema_extra)


def _lenient_list(value: Any) -> Any:
    """One value stands for all; a comma-separated string is a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, list | tuple):
        return [piece for part in value for piece in (_lenient_list(part) if isinstance(part, str) else [part])]
    return value


def _sizes(values: list[str]) -> list[str]:
    """WIDTHxHEIGHT, each."""
    for value in values:
        if not re.fullmatch(r"\d{1,6}x\d{1,6}", value):
            raise ValueError(f"must be sizes as WIDTHxHEIGHT in pixels, such as 512x512, not {value[:40]!r}")
    return values


def _distinct(value: str | list[str] | None) -> str | list[str] | None:
    """One or several, none twice."""
    if isinstance(value, list) and (not value or len(set(value)) < len(value)):
        raise ValueError("must be one or several, and none twice")
    return value


def one_or_more(value: str | list[str] | None) -> tuple[str, ...]:
    """The same as a tuple; None is none."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _endpoint(value: str | None) -> str | None:
    """Three names."""
    if value is not None and not re.fullmatch(r"(dyn://)?[\w-]+\.[\w-]+\.[\w-]+", value):
        raise ValueError("must be dyn://NAMESPACE.COMPONENT.ENDPOINT, such as dyn://dynamo.backend.generate")
    return value


def _namespace(value: str) -> str:
    """The first of them."""
    if not re.fullmatch(r"[\w-]+", value):
        raise ValueError("must be letters, digits, _ and -, such as dynamo")
    return value


REPEATED = ("model_path", "served_model_name")  # given several times on a command line for several values
OneOrMore = Annotated[str | list[str], AfterValidator(_distinct)]


def _json_object(example: str) -> BeforeValidator:
    """On a command line and in the environment an object is written as JSON."""

    def read(value: Any) -> Any:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            found = None
        if isinstance(value, str) and not isinstance(found, dict):
            raise ValueError(f"must be a JSON object, such as {example}")
        return found

    return BeforeValidator(read)


def _cache(name: str, help: str, default: Any = None) -> Any:
    """An option of the step cache, under its own variable and under the one of SGLang's documents."""
    return option(default, f"Step cache: {help}", env=(f"SGLANG_CACHE_DIT_{name}",))


class Section(BaseModel):
    """A group of options; immutable, and strict about unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} = {value}: must not be a boolean")
        return values

    def refuse_what_is_missing(self) -> None:
        """Raise Unsupported for the first option that asks for what this version does not have."""
        for name, field in type(self).model_fields.items():
            extra = extra_of(field)
            value = getattr(self, name)
            if isinstance(value, Section):
                value.refuse_what_is_missing()
            if extra["only"] is not None and value not in extra["only"]:
                raise errors.Unsupported(f"{name} = {value!r}: {extra['why']}", param=name)


class VaeConfig(Section):
    """The `vae_config` object of a config file."""

    load_encoder: bool = option(True, "Keep the VAE's encoder. Only pictures to start from need it.")
    load_decoder: bool = option(True, "Keep the VAE's decoder.", only=(True,), why="every task here decodes its latents")
    tile_sample_min_height: int | None = option(None, "Height of a tile when tiling, in pixels.", ge=16)
    tile_sample_min_width: int | None = option(None, "Width of a tile when tiling, in pixels.", ge=16)


class EngineOptions(Section):
    """Which models run, and how."""

    model_path: OneOrMore = option(
        "stepwell/tiny-flux",
        "Model to load: a bundled id, a local folder in diffusers layout, or a hub id. Repeat it, or give a list in a file or "
        "with commas in the environment, to serve several; every other option holds for all of them.",
        aliases=("model",),
    )
    transformer_path: str | None = option(
        None, "Load the transformer's weights from this GGUF file or folder of safetensors instead of the model's own."
    )
    vae_path: str | None = option(None, "Load the VAE from this folder or hub id instead of the model's own.")
    backend: Literal["auto", "stepwell", "sglang", "diffusers"] = option(
        "auto",
        "auto and stepwell (sglang is a synonym) run the native engine.",
        only=("auto", "stepwell", "sglang"),
        why=_NO_DIFFUSERS,
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where the model runs.")
    dit_precision: Precision | None = option(
        None, "Precision of the transformer. Default: bf16 on a GPU; fp32 on a CPU if it fits, else bf16.", aliases=("precision",)
    )
    vae_precision: Precision | None = option(None, "Precision of the VAE. Default: that of the transformer.")
    text_encoder_precisions: Annotated[list[Precision] | None, BeforeValidator(_lenient_list)] = option(
        None, "Precision of the text encoders: one value for all, or one each. Default: that of the transformer."
    )
    quantization: Literal["none", "int8_weight_only", "int8_dynamic", "fp8"] = option(
        "none",
        "Hold the linears of the transformer's blocks in fewer bits. int8_weight_only: a quarter of fp32's memory. int8_dynamic: "
        "products in int8 too, faster for wide layers on CPUs with VNNI. fp8: the same for GPUs of capability 8.9 and up.",
    )
    attention_backend: Literal[
        "auto", "torch_sdpa", "blocked", "fa", "fa3", "fa4", "sage_attn", "sage_attn_3", "sliding_tile_attn",
        "sliding_tile_torch", "video_sparse_attn", "block_sparse_torch", "vmoba_attn", "triton", "aiter",
    ] = option(
        "auto",
        "Attention kernel of the transformer; docs/attention.md lists what each needs. auto measures on a CPU and takes fa on a "
        "GPU where its library is installed, else torch_sdpa. fa3 and fa4 are fa.",
    )  # fmt: skip
    component_attention_backends: Annotated[dict[str, str] | None, _json_object('{"transformer": "torch_sdpa"}')] = option(
        None,
        "Attention kernels by component (transformer, text_encoder, text_encoder_2) or by layers (transformer.blocks.0, "
        "transformer.blocks.1*); beats attention_backend, and of several patterns the last one that matches wins.",
    )
    mask_strategy_file_path: str | None = option(
        None,
        "Windows of sliding tile attention: a JSON file, timestep_layer_head to three numbers of tiles.",
        env=("SGLANG_DIFFUSION_ATTENTION_CONFIG",),
    )
    sliding_tile_window: Annotated[list[TileCount] | None, BeforeValidator(_lenient_list)] = option(
        None, "One window for all layers instead of that file: frames, rows, columns in tiles.", min_length=3, max_length=3
    )
    attention_sparsity: float | None = option(
        None, "Share of tiles that video_sparse_attn and block_sparse_torch skip. Default: 0.5.", ge=0, lt=1
    )
    linear_backend: Literal["auto", "torch", "packed"] = option(
        "auto", "Linear layers on a CPU. auto measures; packed lays weights out for oneDNN beforehand."
    )
    vae_tiling: bool = option(False, "Decode tile by tile: less memory for large pictures.")
    vae_slicing: bool = option(False, "Decode one picture of a batch at a time: less memory.")
    vae_config: Annotated[VaeConfig, _json_object('{"load_encoder": false}')] = option(
        VaeConfig(), "What of the VAE to load, and the size of its tiles."
    )
    threads: int | None = option(None, "CPU threads. Default: torch's own choice.", ge=1, le=1024)
    max_batch_tokens: int | None = option(
        None, "Tokens one denoising step may hold together. Default: measured, just enough to saturate the device.", ge=1
    )
    scheduling_policy: SchedulingPolicy = option(
        "shortest",
        "Who goes next: the least remaining work, step by step; or fifo, one request after the other, to compare with.",
    )
    max_running_samples: int = option(32, "Samples that may be under way, and in memory, at once.", ge=1, le=4096)
    max_queued_samples: int = option(1024, "Samples that may wait; beyond it requests are refused with 429.", ge=1)
    max_queue_seconds: float | None = option(
        None, "Work that may wait, in seconds at the measured pace; beyond it requests are refused with 429.", gt=0
    )
    hang_seconds: float = option(
        30.0, "When served: a step that takes longer than this, and 20 times longer than usual, counts as hung.", gt=0
    )
    checkpoint_interval_s: float = option(
        30.0,
        "Seconds of work after which a sample's state is saved, for a process that is killed to go on from there; 0 is after "
        "every step, a negative number never.",
    )
    checkpoint_path: str | None = option(
        None, "Folder to save it in, readable by this user only. Default: in the data path when served, else nothing is saved."
    )
    dllm_algorithm: str | None = option(
        None,
        "How a text model fills its blocks where a request does not say: LowConfidence (the default), JointThreshold, Credit or "
        "Hierarchy.",
    )
    dllm_algorithm_config: str | None = option(
        None, "YAML or JSON file of that algorithm's parameters, and of block_size, the tokens of a block."
    )
    kv_cache_mb: int | None = option(
        None, "Memory for keys and values of texts, in MiB. Default: 256 on a CPU, 30 % of what is free on a GPU.", ge=1
    )
    prompt_cache_mb: int = option(256, "Memory for embeddings of prompts seen before, in MiB.", ge=0)

    lora_path: str | None = option(None, "LoRA adapter to load.", only=(None,), why=_NO_LORA)
    lora_nickname: str = option("default", "Name of that adapter.", only=("default",), why=_NO_LORA)
    num_gpus: int = option(1, "Processes that run a model together, one per GPU; on a CPU they share its cores.", ge=1, le=64)
    tp_size: int = option(
        1,
        "Tensor parallelism: processes that split the weights of a model of text. num_gpus need not be given then.",
        ge=1,
        le=64,
    )
    sp_degree: int | None = option(
        None,
        "Sequence parallelism: processes that share the tokens of a picture or video. Default: ulysses_degree times ring_degree.",
        aliases=("sp_size",),
        ge=1,
    )
    ulysses_degree: int | None = option(
        None,
        "Its part that spreads attention heads, which it must divide. Default: sp_degree, as far as ring_degree leaves it.",
        ge=1,
    )
    ring_degree: int | None = option(None, "Its part that sends keys and values round. Default: 1.", ge=1)
    enable_cfg_parallel: bool = option(
        False, "Spread the guidance branches of one picture or video over them too, not only several of those."
    )
    vae_sp: bool = option(
        False, "Decode parts of a video on all of num_gpus: of HunyuanVideo along time, of Wan tiles (vae_tiling)."
    )
    text_encoder_cpu_offload: bool = option(False, "Text encoders are on the GPU only while they encode.")
    vae_cpu_offload: bool = option(False, "The VAE is on the GPU only while it encodes or decodes.")
    dit_cpu_offload: bool = option(False, "The transformer is on the GPU only while it denoises.")
    dit_layerwise_offload: bool = option(
        False,
        "Each of the transformer's blocks is fetched while the one before computes: to a GPU from memory, to a CPU from a file.",
    )
    pin_cpu_memory: bool = option(
        False, "What is offloaded from a GPU waits in pinned memory: faster to fetch, can't be swapped."
    )
    offload_path: str | None = option(
        None, "Folder on a disk for the file of layer-wise offload on a CPU. Default: the system's temporary folder."
    )
    warmup_sizes: Annotated[list[str], BeforeValidator(_lenient_list), AfterValidator(_sizes)] = option(
        [], "Make one step of a picture of each size, WIDTHxHEIGHT, before taking requests.", aliases=("warmup_resolutions",)
    )
    enable_torch_compile: bool = option(
        False,
        "Compile the arithmetic between the transformer's linears and attention, at load. Seconds to start; no gain on a CPU.",
    )
    fused_kernels: bool = option(
        False, "Fused Triton kernels for that arithmetic, on a GPU; tried against eager PyTorch at load."
    )
    trust_remote_code: bool = option(False, "No effect: no model here needs code from its repository, and none is run.")
    diffusers_attention_backend: Literal["flash", "_flash_3_hub", "sage", "xformers", "native"] | None = option(
        None,
        "The same by diffusers' names: flash is fa, sage is sage_attn, native is torch_sdpa.",
        only=(None, "flash", "sage", "native"),
        why="there is no xformers backend here, and code is never fetched from a hub; use attention_backend = torch_sdpa or fa",
    )
    diffusers_kwargs: Annotated[dict[str, Any] | None, _json_object("{}")] = option(
        None, "Extra arguments for a diffusers pipeline.", only=(None,), why=_NO_DIFFUSERS
    )
    profile: bool = option(False, "Write traces of requests' denoising steps, made by torch's profiler, to ./logs.")
    num_profiled_timesteps: int = option(5, "Steps in such a trace, after the first one, which warms up.", ge=1)
    profile_all_stages: bool = option(False, "With --profile: trace every stage of a request, and every step.")

    cache_dit_enabled: bool = option(
        False, "Step cache: reuse what earlier denoising steps computed. A request's own `cache` comes first.",
        env=("SGLANG_CACHE_DIT_ENABLED",),
    )  # fmt: skip
    cache_method: CacheMethod | None = option(
        None, "Step cache: how it decides. Default: dbcache where cache_dit_enabled is set, else none."
    )
    cache_dit_fn: int | None = _cache("FN", "first blocks that are always computed. Default: 1.")
    cache_dit_bn: int | None = _cache("BN", "last blocks that are always computed. Default: 0.")
    cache_dit_warmup: int | None = _cache(
        "WARMUP", "steps that are computed first. Default: 4; 0 with first_block, 1 with teacache."
    )
    cache_dit_rdt: float | None = _cache(
        "RDT", "change from which a step is computed; 0 computes all. Default: 0.24; 0.08 with first_block."
    )
    cache_dit_mc: int | None = _cache(
        "MC", "cached steps in a row, at most; -1 is no bound. Default: 3; -1 with first_block and teacache."
    )
    cache_dit_taylorseer: bool = _cache("TAYLORSEER", "extrapolate what is skipped instead of repeating it.", default=False)
    cache_dit_ts_order: int | None = _cache("TS_ORDER", "order of that extrapolation, 1 or 2. Default: 1.")
    cache_dit_scm_preset: Literal["none", "slow", "medium", "fast", "ultra"] | None = _cache(
        "SCM_PRESET", "steps that are computed whatever changed; ultra computes the fewest. Default: none."
    )
    cache_dit_scm_policy: Literal["dynamic", "static"] | None = _cache(
        "SCM_POLICY", "whether the others are looked at (dynamic), or cached unseen (static). Default: dynamic."
    )
    cache_dit_scm_compute_bins: Annotated[list[int] | None, BeforeValidator(_lenient_list)] = _cache(
        "SCM_COMPUTE_BINS", "lengths of the runs of computed steps, such as 8,3,3,2,2, in place of a preset."
    )
    cache_dit_scm_cache_bins: Annotated[list[int] | None, BeforeValidator(_lenient_list)] = _cache(
        "SCM_CACHE_BINS", "lengths of the runs of cached steps between them; the last pair of runs goes on to the end."
    )

    @property
    def model_paths(self) -> tuple[str, ...]:
        """Every model to load, in order."""
        return one_or_more(self.model_path)


class SamplingOptions(Section):
    """What to make. Whatever is left out is the model's default."""

    prompt: str | None = option(None, "What the picture or video shall show.")
    negative_prompt: str | None = option(None, "What it shall not show; acts with --true-cfg-scale above 1.")
    width: int | None = option(None, "Width in pixels.")
    height: int | None = option(None, "Height in pixels.")
    num_inference_steps: int | None = option(None, "Denoising steps.")
    guidance_scale: float | None = option(None, "Distilled guidance, for models that have it.")
    guidance_scale_2: float | None = option(
        None, "Guidance of the second transformer, for models that have two. Default: that of the first."
    )
    true_cfg_scale: float | None = option(None, "Classifier-free guidance; 1 is off, above 1 doubles the work.")
    seed: int | None = option(None, "Seed of the first output; the next ones count up. Default: random.")
    num_outputs_per_prompt: int | None = option(None, "How many pictures or videos.", aliases=("num_outputs", "n"))
    max_sequence_length: int | None = option(None, "Tokens the prompt is padded to, or cut at.")
    num_frames: int | None = option(None, "Frames of a video.")
    fps: int | None = option(None, "Frames per second of a video.")
    image_path: str | None = option(None, "Picture to start from: a PNG, JPEG or WebP file, or its URL.")
    strength: float | None = option(None, "How much of that picture is noised away, above 0 and up to 1.")
    max_tokens: int | None = option(None, "The most tokens a text may have.")
    temperature: float | None = option(None, "How freely a text's tokens are drawn. Default: 0, the likeliest ones.")
    top_p: float | None = option(None, "The share of the likeliest tokens that a text's are drawn from.")


class OutputOptions(Section):
    """Where results go."""

    output_path: str = option("outputs", "Folder to save to.")
    output_file_name: str | None = option(
        None,
        "File name, whose end decides the format: .png, .jpg or .webp; of a video .mp4, .gif, .webp, or .png for a folder of "
        "numbered frames. Default: from the prompt, as .png or .mp4.",
    )
    save_output: bool = option(True, "Save the result to disk.")
    return_frames: bool = option(False, "Also save the raw frames, uint8 frames × height × width × 3, as a .npy file.")
    perf_dump_path: str | None = option(
        None, "Write how long everything took, stage by stage and step by step, to this JSON file."
    )


class ServingOptions(Section):
    """Every way of serving.

    Names, stored results, pictures that clients send, and how it stops."""

    served_model_name: OneOrMore | None = option(
        None, "Name of the model in the API; of several, repeated in the same order. Default: the model path."
    )
    media_output_fs_url: str | None = option(
        None,
        "Where pictures and videos are kept: file:///folder or s3://bucket/prefix. Default: in the data path; a worker has none, "
        "and sends them in its answers.",
        aliases=("fs_url",),
    )
    media_output_http_url: str | None = option(
        None,
        "Base URL under which that place is served to clients. Default: this server's own routes; of a worker, the place itself.",
        aliases=("http_url",),
    )
    allow_url_inputs: bool = option(False, "Fetch input pictures from URLs that clients give; public addresses only.")
    url_input_hosts: Annotated[list[str], BeforeValidator(_lenient_list)] = option(
        [], "Hosts such URLs may name. Default: any public one."
    )
    max_upload_mb: int = option(50, "Largest picture a client may send, in MiB.", ge=1, le=4096)
    max_input_megapixels: float = option(64.0, "Largest picture a client may send, in millions of pixels.", gt=0)
    drain_seconds: float = option(
        30.0, "Time for what is running when asked to stop; what is left of jobs runs at the next start.", ge=0
    )


class ServerOptions(ServingOptions):
    """The HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(30000, "Port to listen on.", ge=0, le=65535)
    api_key: str | None = option(None, "Key that every request must carry as a Bearer token. Default: none is asked for.")
    api_key_file: str | None = option(None, "File of such keys, one a line, plain or as sha256:HEX. Each sees its own jobs only.")
    allow_no_key: bool = option(False, "Listen beyond this machine without asking for a key.")
    data_path: str = option("stepwell-data", "Folder for jobs and, unless a URL says otherwise, for pictures and videos.")
    media_ttl_seconds: float = option(86400.0, "How long results and their records are kept.", gt=0)
    webhook_url: str | None = option(None, "Tell this URL of every job that ends, as Standard Webhooks.")
    webhook_secret: str | None = option(None, "Secret that signs those messages: whsec_ and base64.")


class WorkerOptions(ServingOptions):
    """A worker for NVIDIA Dynamo.

    Addresses, leases and TLS are the DYN_ and ETCD_ variables of its runtime."""

    endpoint: Annotated[str | None, AfterValidator(_endpoint)] = option(
        None, "Where the worker is found: dyn://NAMESPACE.COMPONENT.ENDPOINT. Default: MODEL.generate in the namespace.",
        env=("DYN_ENDPOINT",),
    )  # fmt: skip
    namespace: Annotated[str, AfterValidator(_namespace)] = option(
        "dynamo", "Dynamo's namespace, unless the endpoint names one.", env=("DYN_NAMESPACE",)
    )
    image_diffusion_worker: bool = option(False, "The model must make pictures. What a model makes is found out anyway.")
    video_generation_worker: bool = option(False, "The model must make videos.")
    discovery_backend: Literal["kubernetes", "etcd", "file", "mem"] = option(
        "etcd", "How frontends find the worker; theirs must be the same. file is for one machine.", env=("DYN_DISCOVERY_BACKEND",)
    )
    request_plane: Literal["tcp", "nats"] = option("tcp", "How requests come.", env=("DYN_REQUEST_PLANE",))
    response_plane: Literal["tcp", "quic"] = option("tcp", "How answers go back.", env=("DYN_RESPONSE_PLANE",))
    event_plane: Literal["zmq", "nats"] | None = option(None, "How events are published. Default: zmq.", env=("DYN_EVENT_PLANE",))
    skip_tokenizer_init: bool = option(False, "No effect: frontends make the tokens, from the tokenizer that this worker names.")
    enable_metrics: bool = option(False, "No effect: DYN_SYSTEM_PORT is what serves metrics.")
    disable_cuda_graph: bool = option(False, "No effect: there are no CUDA graphs here.")
    disable_overlap_schedule: bool = option(False, "No effect: there is no other schedule here.")


SECTIONS: dict[str, tuple[type[Section], ...]] = {
    "generate": (EngineOptions, SamplingOptions, OutputOptions, ServerOptions),
    "serve": (EngineOptions, ServerOptions),
    "worker": (EngineOptions, WorkerOptions),
    "doctor": (EngineOptions,),
}

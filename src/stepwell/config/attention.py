"""Which attention kernel runs where: a table of what each needs, and the rules of choosing. Pure, and without torch.

`component_attention_backends` beats `attention_backend` beats the automatic choice. What was asked for by name and can't run is
refused with what it lacks; only `auto` falls back, and `stepwell doctor` shows why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stepwell.config.choice import Choice
from stepwell.config.hardware import Hardware
from stepwell.config.load import unknown_name
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest, Unsupported

COMPONENTS = "component_attention_backends"
WIN = 1.3  # a kernel must be measured this much faster than the default one, so that noise never decides
ALIASES = {"fa3": "fa", "fa4": "fa"}
OF_DIFFUSERS = {"flash": "fa", "sage": "sage_attn", "native": "torch_sdpa"}  # --diffusers-attention-backend
HALF = ("bf16", "fp16")
SLIDING = ("sliding_tile_attn", "sliding_tile_torch")
SPARSE = ("video_sparse_attn", "block_sparse_torch")


@dataclass(frozen=True, slots=True)
class Library:
    """A module that holds a kernel, the package people install for it, and the GPUs it runs on: compute capabilities
    or, ending in .x, all of one major version."""

    module: str
    package: str
    capabilities: tuple[str, ...]

    def runs_on(self, capability: tuple[int, int] | None) -> bool:
        """Whether a GPU of this capability will do; ROCm's numbers mean something else and are not asked about."""
        return capability is not None and not {f"{capability[0]}.x", f"{capability[0]}.{capability[1]}"}.isdisjoint(
            self.capabilities
        )


@dataclass(frozen=True, slots=True)
class Backend:
    """One name of --attention-backend. `libraries` are alternatives, best first; `machines` of cpu, cuda and rocm;
    `head_dims` are those its kernels are built for, and in words; `fits_no` is what its sequences can't be, for models that do
    not say they fit (`Shape.patterns`); `missing` is why it is not in this version; `instead` is what does the same without the
    vendor's library."""

    what: str
    machines: tuple[str, ...] = ("cpu", "cuda", "rocm")
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    libraries: tuple[Library, ...] = ()
    instead: str = "torch_sdpa"
    missing: str | None = None
    head_dims: tuple[range, str] = (range(1, 2**16), "any size")
    fits_no: str | None = None


BY_8 = (range(8, 257, 8), "multiples of 8 up to 256")
TO_128 = (range(1, 129), "up to 128")
TWO = (range(64, 129, 64), "64 and 128")
FA2 = Library("flash_attn", "flash-attn", ("8.x", "9.x", "10.x", "12.x"))
FA3 = Library("flash_attn_interface", "flash_attn_3", ("9.x",))
FA4 = Library("flash_attn.cute", "flash-attn-4", ("9.x", "10.x", "11.x"))
SAGE = Library("sageattention", "sageattention", ("8.0", "8.6", "8.9", "9.0", "12.0"))
SAGE3 = Library("sageattn3", "sageattn3", ("12.0",))
STA = Library("st_attn", "st_attn", ("8.x", "9.x", "10.x", "12.x"))
VSA = Library("vsa", "vsa", ("8.x", "9.x", "10.x", "12.x"))
VMOBA = Library("kernel.attn.vmoba_attn.vmoba", "vmoba", ("8.x", "9.x", "10.x", "12.x"))
AITER = Library("aiter", "aiter", ())

BACKENDS = {
    "torch_sdpa": Backend("PyTorch's scaled_dot_product_attention; cuDNN's kernel first on SM90 and newer"),
    "blocked": Backend("batched matmuls over blocks of queries, for CPUs", ("cpu",), ("fp32", "bf16")),
    "fa": Backend("FlashAttention 3, 4 or 2, all sequences in one call", ("cuda", "rocm"), HALF, (FA3, FA4, FA2), head_dims=BY_8),
    "sage_attn": Backend("SageAttention 2: 8-bit queries and keys", ("cuda",), HALF, (SAGE,), head_dims=TO_128),
    "sage_attn_3": Backend("SageAttention 3: 4-bit", ("cuda",), HALF, (SAGE3,), head_dims=TWO),
    "sliding_tile_attn": Backend(
        "sliding tile attention, the vendor's kernel", ("cuda",), HALF, (STA,), "sliding_tile_torch",
        fits_no="the library st_attn knows videos of three sizes, which it does not make",
    ),
    "sliding_tile_torch": Backend("sliding tile attention in plain PyTorch, any grid"),
    "video_sparse_attn": Backend(
        "top-k tiles, the vendor's kernel", ("cuda",), HALF, (VSA,), "block_sparse_torch", head_dims=TWO,
        fits_no="the library vsa has no place for text among the tiles, and in it text and picture attend together",
    ),
    "block_sparse_torch": Backend("top-k tiles in plain PyTorch, any grid"),
    "vmoba_attn": Backend(
        "mixture of block attention", ("cuda",), HALF, (VMOBA,), "block_sparse_torch",
        "package vmoba (module kernel.attn.vmoba_attn.vmoba) wants chunk sizes and a top-k per layer that a model was trained "
        "with, and no model of this version was",
    ),
    "triton": Backend(
        "a Triton kernel of our own for texts, all of a step in one call", ("cuda", "rocm"),
        fits_no="it reads the pages that only models of text keep",
    ),
    "aiter": Backend("AMD's kernels, all sequences in one call", ("rocm",), HALF, (AITER,), head_dims=BY_8),
}  # fmt: skip
MODULES = tuple(library.module for backend in BACKENDS.values() for library in backend.libraries)
# implementations of transformers, for text encoders
OF_TRANSFORMERS = {"torch_sdpa": "sdpa", "eager": "eager", "fa": "flash_attention_2"}


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model. `patterns` are the vendors' sparse backends, by name, that its sequences fit."""

    heads: int
    head_dim: int
    patterns: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Site:
    """Where attention shall run: a device, a precision, what is known of the machine, and of the model (None: nothing)."""

    device: str
    precision: str
    hardware: Hardware
    shape: Shape | None = None

    @property
    def machine(self) -> str:
        return "rocm" if self.device == "cuda" and self.hardware.rocm else self.device


def library_of(backend: Backend, site: Site) -> Library | None:
    """The best installed library of a backend that runs on this GPU, None where there is none."""
    for library in backend.libraries:
        is_usable = library.module in site.hardware.packages and library.module not in site.hardware.broken
        if is_usable and (site.machine == "rocm" or library.runs_on(site.hardware.capability)):
            return library
    return None


def lacks(name: str, site: Site) -> str | None:
    """What a backend needs and does not find here, None if it can run."""
    fits_no = BACKENDS[name].fits_no
    if fits_no is not None and site.shape is not None and name not in site.shape.patterns:
        return f"not for this model: {fits_no}"
    return _lacks(BACKENDS[name], site)


def _lacks(backend: Backend, site: Site) -> str | None:
    if backend.missing is not None:
        return f"not in this version: {backend.missing}"
    found = []
    if site.machine not in backend.machines:
        wanted = {"cpu": "a CPU", "cuda": "a CUDA GPU", "rocm": "an AMD GPU under ROCm"}
        found.append(" or ".join(wanted[machine] for machine in backend.machines))
    elif site.precision not in backend.precisions:
        found.append(f"precision {' or '.join(backend.precisions)} instead of {site.precision}")
    if backend.libraries and library_of(backend, site) is None:
        found.append(_lacking_library(backend, site))
    if site.shape is not None and site.shape.head_dim not in backend.head_dims[0]:
        found.append(f"head dimensions of {backend.head_dims[1]} instead of {site.shape.head_dim}")
    return f"needs {' and '.join(found)}" if found else None


def _lacking_library(backend: Backend, site: Site) -> str:
    for library in backend.libraries:
        if library.module in site.hardware.broken:
            return f"an install of {library.package} that fits this torch, as the one here {site.hardware.broken[library.module]}"
    installed = [library for library in backend.libraries if library.module in site.hardware.packages]
    if installed and site.machine == "cuda":
        capability = site.hardware.capability or (0, 0)
        numbers = ", ".join(dict.fromkeys(number for library in installed for number in library.capabilities))
        return f"a GPU of compute capability {numbers} for {installed[0].package}, this one is {capability[0]}.{capability[1]}"
    names = " or ".join(f"{library.package} (module {library.module})" for library in backend.libraries)
    return f"the package {names}, not installed here"


def table(site: Site) -> list[tuple[str, str, str]]:
    """(name, usable?, what it is or lacks) of every backend, for people."""
    rows = []
    for name, backend in BACKENDS.items():
        reason = lacks(name, site)
        library = library_of(backend, site)
        through = f" ({library.module})" if library is not None else ""
        rows.append((name, "yes" if reason is None else "no", f"{backend.what}{through}" if reason is None else reason))
    return rows


# ------------------------------------------------------------------------------------------------------------- choosing
def choose(options: EngineOptions, site: Site, only: Choice | None = None) -> Choice:
    """The transformer's kernel; where none is asked for, `only` that one, if there is one."""
    parts = options.component_attention_backends or {}
    if "transformer" in parts:
        return _named(COMPONENTS, parts["transformer"], site, "as asked for the transformer", "transformer")
    if options.diffusers_attention_backend is not None:
        return _as_diffusers(options, options.diffusers_attention_backend, site)
    if options.attention_backend != "auto":
        return _named("attention_backend", options.attention_backend, site, "as asked")
    return only or _automatic(site)


def choose_parts(options: EngineOptions, encoders: Mapping[str, str], site: Site) -> tuple[tuple[str, Choice], ...]:
    """What component_attention_backends says of text encoders and of patterns of layers, "transformer.…", in its order.

    encoders: the precision of each text encoder, by its name. A text encoder's choice is the name transformers has for it.
    Whether a pattern matches is not known here.
    """
    chosen = []
    for part, asked in (options.component_attention_backends or {}).items():
        if part in encoders:
            chosen.append((part, _of_encoder(part, asked, replace(site, precision=encoders[part], shape=None))))
        elif part.startswith("transformer."):
            chosen.append((part, _named(COMPONENTS, asked, site, "as asked for these layers", part)))
        elif part != "transformer":
            raise unknown_name(part, ["transformer", *encoders, "transformer.blocks.0"], f"in {COMPONENTS}")
    return tuple(chosen)


def check_options(options: EngineOptions, names: Sequence[str]) -> None:
    """Refuse options of sparse patterns without a pattern that uses them, and the other way round."""
    windows = {"mask_strategy_file_path": options.mask_strategy_file_path, "sliding_tile_window": options.sliding_tile_window}
    given = [name for name, value in windows.items() if value is not None]
    sliding = [name for name in names if name in SLIDING]
    if len(given) == 2:
        raise InvalidRequest("mask_strategy_file_path and sliding_tile_window say the same thing twice; give one", param=given[1])
    if sliding and not given:
        raise InvalidRequest(
            f"{sliding[0]} needs its windows: a mask-strategy file (mask_strategy_file_path, or the variable "
            "SGLANG_DIFFUSION_ATTENTION_CONFIG), or one window for all layers, such as sliding_tile_window = 3,3,3",
            param="mask_strategy_file_path",
        )
    if options.sliding_tile_window is not None and not sliding:  # the file's variable may have been left over
        raise InvalidRequest(
            f"sliding_tile_window = {options.sliding_tile_window!r}: no layer uses sliding tiles; choose {' or '.join(SLIDING)}, "
            "or leave it out",
            param="sliding_tile_window",
        )
    if options.attention_sparsity is not None and not set(names) & set(SPARSE):
        raise InvalidRequest(
            f"attention_sparsity = {options.attention_sparsity}: no layer skips tiles; choose {' or '.join(SPARSE)}, "
            "or leave it out",
            param="attention_sparsity",
        )


def _named(field: str, asked: str, site: Site, reason: str, part: str | None = None) -> Choice:
    """A backend asked for by name, as `part` of a field that has parts, or the reason it can't be had."""
    shown = field if part is None else f"{field}: {part}"
    name = ALIASES.get(asked, asked)
    if name == "auto":
        return _automatic(site)
    if name not in BACKENDS:
        raise unknown_name(asked, [*BACKENDS, *ALIASES, "auto"], f"of an attention backend in {shown}")
    reason_not = lacks(name, site)
    if reason_not is not None:
        raise Unsupported(f"{shown} = {asked!r}: {reason_not}; use {BACKENDS[name].instead!r} or 'auto'", param=field)
    library = library_of(BACKENDS[name], site)
    return Choice(name, reason if library is None else f"{reason}; {library.module} is installed")


def _as_diffusers(options: EngineOptions, asked: str, site: Site) -> Choice:
    name = OF_DIFFUSERS[asked]
    own = ALIASES.get(options.attention_backend, options.attention_backend)
    if own not in ("auto", name):
        raise InvalidRequest(
            f"diffusers_attention_backend = {asked!r} means {name!r}, and attention_backend is {own!r}; give one of them",
            param="diffusers_attention_backend",
        )
    reason_not = lacks(name, site)
    if reason_not is not None:
        raise Unsupported(
            f"diffusers_attention_backend = {asked!r}, which is {name!r}: {reason_not}; use 'native'",
            param="diffusers_attention_backend",
        )
    return Choice(name, f"what diffusers calls {asked!r}")


def _automatic(site: Site) -> Choice:
    if site.machine == "cpu":
        return _on_cpu(site.precision, site.hardware)
    reason = lacks("fa", site)
    if reason is None:
        library = library_of(BACKENDS["fa"], site)
        assert library is not None
        return Choice("fa", f"{library.module} is installed: all sequences in one call")
    ideal = replace(site, shape=None, hardware=replace(site.hardware, broken={}))
    return Choice("torch_sdpa", f"fa {reason}", is_warning=lacks("fa", ideal) is None)  # who installed it will wonder


def _on_cpu(precision: str, hardware: Hardware) -> Choice:
    ratio = hardware.measured.get(f"blocked_attention_{precision}")
    if ratio is not None and ratio >= WIN:
        return Choice("blocked", f"measured at {ratio:.2f}× of torch_sdpa's speed here")
    if ratio is not None:
        return Choice("torch_sdpa", f"blocked was measured at {ratio:.2f}× of its speed here; it takes {WIN}× to win")
    return Choice("torch_sdpa", "not measured here")


def _of_encoder(part: str, asked: str, site: Site) -> Choice:
    """transformers' name for a text encoder's kernel."""
    name = ALIASES.get(asked, asked)
    if name not in OF_TRANSFORMERS:
        raise Unsupported(
            f"{COMPONENTS}: {part} = {asked!r}: transformers runs the text encoders, and has {', '.join(OF_TRANSFORMERS)}",
            param=COMPONENTS,
        )
    reason = _lacks(replace(BACKENDS["fa"], libraries=(FA2,)), site) if name == "fa" else None
    if reason is not None:
        raise Unsupported(f"{COMPONENTS}: {part} = {asked!r}: {reason}; use 'torch_sdpa'", param=COMPONENTS)
    return Choice(OF_TRANSFORMERS[name], f"as asked ({asked})")

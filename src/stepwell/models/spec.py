"""What is known of a model before its weights are read: data only, one spec per published checkpoint or family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stepwell.types import Limits, SamplingParams, Task

if TYPE_CHECKING:
    from torch import nn

    from stepwell.stages.base import Stage, StageSettings
    from stepwell.stages.latents import Latents
    from stepwell.weights.gguf import OriginalNames

# parameter of our module -> the checkpoint's tensors it is made of, concatenated along dimension 0
KeyMap = Mapping[str, tuple[str, ...]]
# whether model_index.json and the denoiser's config.json are those of one family member
Matches = Callable[[dict[str, Any], dict[str, Any]], bool]
CLIP_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")  # classes of a part


@dataclass(frozen=True, slots=True)
class Part:
    """One folder of a repository. `kind` says which precision option rules it."""

    folder: str
    kind: str  # "dit", "dit_2", "vae", "text_encoder", "image_encoder", "image_processor", "tokenizer" or "scheduler"
    classes: tuple[str, ...]  # accepted class names, as in model_index.json
    is_optional: bool = False  # whether a repository may lack it


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One family member: how to recognise it, what it can do, and how its pieces fit together.

    `matches` sees the pipeline's model_index.json and the denoiser's config.json.
    `build_denoiser` makes the module from that config; `key_map` names the checkpoint's tensors for its parameters.
    `latents` is how latents are laid out, from that config and the VAE's config.json alone. `pipeline` binds loaded parts to
    stages. `teacache` are the coefficients, highest power first, that turn a change of the first block's input into one of
    the output; empty where nobody has fitted them. `original` is how the denoiser's tensors were named before diffusers, for
    GGUF files. `unused` are endings of the names of tensors that checkpoints hold and nothing reads. `has_guidance` says whether
    guidance_scale means anything, `cfg_field` which field turns classifier-free guidance on. `vendor_patterns` are the
    vendors' sparse attention backends, by name, that know sequences such as its own. `tiny` is a denoiser config small enough for
    tests.
    """

    name: str
    family: str
    pipeline_class: str
    hub_ids: tuple[str, ...]
    tasks: tuple[Task, ...]
    defaults: SamplingParams
    limits: Limits
    parts: Mapping[str, Part]
    matches: Matches
    build_denoiser: Callable[[dict[str, Any]], nn.Module]
    key_map: Callable[[dict[str, Any]], KeyMap]
    latents: Callable[[dict[str, Any], Mapping[str, Any]], Latents]
    pipeline: Callable[[Mapping[str, Any], StageSettings], tuple[Stage, ...]]
    original: OriginalNames | None = None
    unused: tuple[str, ...] = ()
    has_guidance: bool = False
    has_guidance_2: bool = False
    cfg_field: str | None = "true_cfg_scale"
    teacache: tuple[float, ...] = ()
    vendor_patterns: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)

"""FLUX.1: a flow-matching transformer of double-stream, then single-stream blocks (`dev` and `schnell`).

Reference: diffusers `FluxTransformer2DModel` and `FluxPipeline`; BFL's `flux/model.py`. Its blocks are in `dual_stream`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from stepwell.errors import WeightsError
from stepwell.guidance import TRUE_CFG
from stepwell.models import dual_stream
from stepwell.models.configs import check_sizes, read_config
from stepwell.models.dual_stream import DualPrepared, DualStream, Sizes, check_axes, positions
from stepwell.models.flux_original import ORIGINAL
from stepwell.models.spec import KeyMap, ModelSpec, Part
from stepwell.ops.rope import rotary_table
from stepwell.samplers.flow import FlowMatchEuler
from stepwell.stages.base import Stage, StageSettings
from stepwell.stages.decode import DecodeImage
from stepwell.stages.denoise import Denoise
from stepwell.stages.image import EncodeImage
from stepwell.stages.latents import Grid, Lanes, Latents, Phase, PrepareLatents
from stepwell.stages.preview import LatentPreview
from stepwell.stages.text import Conditioning, EncodeText, FluxTextEncoder
from stepwell.types import Limits, SamplingParams, Task


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True, slots=True)
class FluxConfig:
    """The denoiser's config.json; names and defaults are those of diffusers."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> FluxConfig:
        made = read_config(cls, config, "FLUX.1")
        sizes = {
            "in_channels": made.in_channels // 4,
            "num_attention_heads": made.num_attention_heads,
            "joint_attention_dim": made.joint_attention_dim,
            "pooled_projection_dim": made.pooled_projection_dim,
        }
        check_sizes(sizes, made.num_layers + made.num_single_layers)
        check_axes("axes_dims_rope", made.axes_dims_rope, made.attention_head_dim)
        if made.patch_size != 1:
            raise WeightsError(f"patch_size {made.patch_size} is not supported, FLUX.1 has 1", param="patch_size")
        return made

    @property
    def sizes(self) -> Sizes:
        heads, head_dim = self.num_attention_heads, self.attention_head_dim
        return Sizes(
            heads,
            head_dim,
            mlp=4 * heads * head_dim,
            doubles=self.num_layers,
            singles=self.num_single_layers,
            channels=(self.in_channels, self.out_channels or self.in_channels),
            pooled=self.pooled_projection_dim,
            has_guidance=self.guidance_embeds,
        )


# ------------------------------------------------------------------------------------------------------- transformer
class Flux(DualStream):
    """The denoiser."""

    def __init__(self, config: FluxConfig):
        super().__init__(config.sizes)
        self.config = config
        self.text_in = nn.Linear(config.joint_attention_dim, self.width)

    def prepare(self, conditioning: Conditioning, timesteps: Tensor, grid: Grid, guidance: float) -> DualPrepared:
        """Compute all that a request's steps share.

        conditioning: T5 states (tokens, joint_attention_dim) and CLIP's pooled vector (pooled_projection_dim);
        timesteps: (steps,) in [0, 1000]; grid: of image tokens, one frame; guidance: the distilled guidance scale.
        """
        dtype, device = self.dtype, self.device
        # rounded as the reference pipeline rounds: to the latents' precision, then as a fraction of 1000
        time = (timesteps.to(conditioning.states.dtype) / 1000).to(device, dtype) * 1000
        text = self.text_in(conditioning.states.to(device, dtype))
        return DualPrepared(
            text=text.expand(len(timesteps), -1, -1),
            modulation=self.modulation(time, guidance, conditioning.pooled),
            rotary=rotary_table(positions(len(text), grid).to(device), self.config.axes_dims_rope),
        )


# ------------------------------------------------------------------------------------------------------- checkpoints
def key_map(config: Mapping[str, Any]) -> KeyMap:
    """Our parameters and the tensors of a diffusers FLUX.1 transformer they are made of."""
    return dual_stream.key_map(
        FluxConfig.from_json(config).sizes, {"image_in": ("x_embedder",), "text_in": ("context_embedder",)}
    )


# -------------------------------------------------------------------------------------------------- pipeline and specs
def layout(config: FluxConfig, vae: Mapping[str, Any]) -> Latents:
    """The VAE's latents in patches of 2 × 2; `vae` is its config."""
    blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
    return Latents(
        channels=config.in_channels // 4,
        factor=2 ** (len(blocks) - 1),
        scaling=float(vae["scaling_factor"]),
        shift=float(vae.get("shift_factor") or 0.0),
    )


def pipeline(parts: Mapping[str, Any], settings: StageSettings) -> tuple[Stage, ...]:
    """Text to image as `FluxPipeline` does it, image to image as `FluxImg2ImgPipeline` does."""
    denoiser, vae = parts["transformer"], parts["vae"]
    latents = layout(denoiser.config, vae.config)
    lanes = Lanes(denoiser, Phase(FlowMatchEuler(parts["scheduler"]), latents), settings)
    encoder = FluxTextEncoder(parts["tokenizer"], parts["text_encoder"], parts["tokenizer_2"], parts["text_encoder_2"])
    return (
        EncodeText(encoder, TRUE_CFG, settings.prompt_cache_bytes),
        EncodeImage(vae, latents),
        PrepareLatents(lanes),
        Denoise(lanes, TRUE_CFG, LatentPreview(vae, latents), text_in_sequence=True),
        DecodeImage(vae, latents),
    )


_PARTS = {
    "transformer": Part("transformer", "dit", ("FluxTransformer2DModel",)),
    "vae": Part("vae", "vae", ("AutoencoderKL", "AutoencoderTiny")),
    "text_encoder": Part("text_encoder", "text_encoder", ("CLIPTextModel",)),
    "tokenizer": Part("tokenizer", "tokenizer", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "text_encoder_2": Part("text_encoder_2", "text_encoder", ("T5EncoderModel",)),
    "tokenizer_2": Part("tokenizer_2", "tokenizer", ("T5TokenizerFast", "T5Tokenizer")),
    "scheduler": Part("scheduler", "scheduler", ("FlowMatchEulerDiscreteScheduler",)),
}

DEV = ModelSpec(
    name="flux.1-dev",
    family="flux",
    pipeline_class="FluxPipeline",
    hub_ids=("black-forest-labs/FLUX.1-dev",),
    tasks=(Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE),
    defaults=SamplingParams(
        width=1024,
        height=1024,
        num_inference_steps=50,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        num_outputs=1,
        max_sequence_length=512,
        strength=0.6,
        num_frames=1,
        fps=1,
    ),
    limits=Limits(),
    parts=_PARTS,
    matches=lambda index, config: index.get("_class_name") == "FluxPipeline" and bool(config.get("guidance_embeds")),
    build_denoiser=lambda config: Flux(FluxConfig.from_json(config)),
    key_map=key_map,
    latents=lambda config, vae: layout(FluxConfig.from_json(config), vae),
    pipeline=pipeline,
    original=ORIGINAL,
    has_guidance=True,
    # of FLUX.1-dev: TeaCache4FLUX's table
    teacache=(4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    tiny={
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    },
)

SCHNELL = replace(
    DEV,
    name="flux.1-schnell",
    hub_ids=("black-forest-labs/FLUX.1-schnell",),
    defaults=replace(DEV.defaults, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256),
    matches=lambda index, config: index.get("_class_name") == "FluxPipeline" and not config.get("guidance_embeds"),
    has_guidance=False,
    tiny={**DEV.tiny, "guidance_embeds": False},
)

SPECS = (DEV, SCHNELL)

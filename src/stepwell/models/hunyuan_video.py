"""HunyuanVideo, text to video and image to video, and FastHunyuan, which was distilled to six steps.

Reference: diffusers `HunyuanVideoTransformer3DModel`, `HunyuanVideoPipeline` and `HunyuanVideoImageToVideoPipeline`. Its blocks
are FLUX's (`dual_stream`). Notable choices: padding of a prompt is left out of the sequences, where the reference masks it; the
text, which a small transformer refines by the step's time, is made for all steps beforehand; where the picture lies beside the
latents, `num_frames` counts the frames that are seen, four fewer than the reference decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.errors import WeightsError
from stepwell.guidance import TRUE_CFG
from stepwell.models import dual_stream
from stepwell.models.configs import check_sizes, read_config
from stepwell.models.dual_stream import DualPrepared, DualStream, Sizes, check_axes, positions
from stepwell.models.spec import CLIP_PROCESSORS, KeyMap, Matches, ModelSpec, Part
from stepwell.ops.layers import TIME_CHANNELS, Embedder, time_features
from stepwell.ops.rope import rotary_table
from stepwell.samplers.flow import FlowMatchEuler
from stepwell.stages.base import Stage, StageSettings
from stepwell.stages.denoise import Denoise
from stepwell.stages.latents import Grid, Lanes, Latents, Phase, PrepareLatents
from stepwell.stages.preview import LatentPreview
from stepwell.stages.text import Conditioning, EncodeText, EncodeTextAndPicture, HunyuanPictureEncoder, HunyuanTextEncoder
from stepwell.stages.video import DecodeVideo, EncodeStill, HunyuanDecoder
from stepwell.types import Limits, SamplingParams, Task

EPS = 1e-6
REFINER_RATIO = 4  # of the widths of a refiner's feed-forward, whatever that of the blocks is
CONCAT, REPLACE = "latent_concat", "token_replace"  # the picture beside the latents, or as their first frame
EVERY = {CONCAT: 2, REPLACE: 4}  # of the picture's states in the text, one of so many is kept
NOISE = 0.999  # that a video begins under; the rest is its picture
IMAGE_PIPELINE = "HunyuanVideoImageToVideoPipeline"
FAST_SHIFT = 17.0  # of FastHunyuan's schedule (its model card); its scheduler's config holds HunyuanVideo's 7


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True, slots=True)
class HunyuanConfig:
    """The denoiser's config.json; names and defaults are those of diffusers."""

    in_channels: int = 16
    out_channels: int | None = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)
    image_condition_type: str | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> HunyuanConfig:
        made = read_config(cls, config, "HunyuanVideo")
        names = ("in_channels", "num_attention_heads", "patch_size", "text_embed_dim", "pooled_projection_dim")
        counts = (made.in_channels, made.num_attention_heads, made.patch_size, made.text_embed_dim, made.pooled_projection_dim)
        check_sizes(
            {**dict(zip(names, counts, strict=True)), "out_channels": made.channels_out, "mlp_ratio": made.sizes.mlp},
            made.num_layers + made.num_single_layers + made.num_refiner_layers,
        )
        check_axes("rope_axes_dim", made.rope_axes_dim, made.attention_head_dim)
        refused = {
            "patch_size_t": made.patch_size_t != 1,
            "qk_norm": made.qk_norm != "rms_norm",
            "image_condition_type": made.image_condition_type not in (None, CONCAT, REPLACE),
            "out_channels": made.channels_out != made.latent_channels,
            "in_channels": made.in_channels != made.latent_channels + made.channels_beside,
            "rope_theta": made.rope_theta <= 0,
        }
        for name, is_odd in refused.items():
            if is_odd:
                raise WeightsError(f"transformer/config.json: {name} = {config.get(name)!r} is not supported", param=name)
        return made

    @property
    def channels_out(self) -> int:
        return self.out_channels or self.in_channels

    @property
    def channels_beside(self) -> int:
        """What lies beside the latents: those of the picture, and a mask."""
        return self.in_channels // 2 + 1 if self.image_condition_type == CONCAT else 0

    @property
    def latent_channels(self) -> int:
        return self.in_channels // 2 if self.image_condition_type == CONCAT else self.in_channels

    @property
    def sizes(self) -> Sizes:
        heads, head_dim, patch = self.num_attention_heads, self.attention_head_dim, self.patch_size**2
        return Sizes(
            heads,
            head_dim,
            mlp=int(heads * head_dim * self.mlp_ratio),
            doubles=self.num_layers,
            singles=self.num_single_layers,
            channels=(self.in_channels * patch, self.channels_out * patch),
            pooled=self.pooled_projection_dim,
            has_guidance=self.guidance_embeds,
        )


# ------------------------------------------------------------------------------------------------------------ layers
class RefinerBlock(nn.Module):
    """Attention among a prompt's tokens and a feed-forward, both gated by the time."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.norm, self.mlp_norm = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, REFINER_RATIO * width), nn.Linear(REFINER_RATIO * width, width)
        self.gates = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x: (tokens, width); vector: (1, width)"""
        gate, mlp_gate = self.gates(vector).chunk(2, dim=-1)
        q, k, v = self.qkv(self.norm(x)).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
        x = x + gate * self.out(attended)
        return x + mlp_gate * self.down(F.silu(self.up(self.mlp_norm(x))))


class Refiner(nn.Module):
    """Makes a language model's states into the text that the blocks see, anew for each step's time."""

    def __init__(self, sizes: Sizes, text_width: int, layers: int):
        super().__init__()
        self.text_in = nn.Linear(text_width, sizes.width)
        self.time_embedder, self.pooled_embedder = Embedder(TIME_CHANNELS, sizes.width), Embedder(text_width, sizes.width)
        self.layers = nn.ModuleList(RefinerBlock(sizes) for _ in range(layers))

    def forward(self, states: Tensor, time: Tensor) -> Tensor:
        """(tokens, text width), (steps,) in [0, 1000] -> (steps, tokens, width), one step at a time to spare memory"""
        pooled = states.float().mean(0, keepdim=True).to(states.dtype)
        vectors = F.silu(self.time_embedder(time_features(time).to(states.dtype)) + self.pooled_embedder(pooled))
        text = self.text_in(states)
        made = text.new_empty(len(vectors), *text.shape)
        for step, vector in enumerate(vectors.split(1)):
            x = text
            for layer in self.layers:
                x = layer(x, vector)
            made[step] = x
        return made


class HunyuanVideo(DualStream):
    """The denoiser."""

    def __init__(self, config: HunyuanConfig):
        super().__init__(config.sizes)
        self.config = config
        self.refiner = Refiner(config.sizes, config.text_embed_dim, config.num_refiner_layers)

    def prepare(self, conditioning: Conditioning, timesteps: Tensor, grid: Grid, guidance: float) -> DualPrepared:
        """Compute all that a request's steps share.

        conditioning: Llama's states (tokens, text_embed_dim) and CLIP's pooled vector (pooled_projection_dim), how many of the
        first tokens are given; timesteps: (steps,) in [0, 1000]; grid: of the video's tokens; guidance: the distilled
        guidance scale, which given tokens know nothing of.
        """
        time = timesteps.to(self.device, self.dtype)  # rounded as the reference pipeline rounds
        text = self.refiner(conditioning.states.to(self.device, self.dtype), time)
        place, given = positions(text.shape[1], grid).to(self.device), conditioning.given
        return DualPrepared(
            text=text,
            modulation=self.modulation(time, guidance, conditioning.pooled),
            rotary=rotary_table(place, self.config.rope_axes_dim, self.config.rope_theta),
            still=self.modulation(time.new_zeros(1), None, conditioning.pooled)[0] if given else None,
            given=given,
        )


# ------------------------------------------------------------------------------------------------------- checkpoints
def key_map(config: Mapping[str, Any]) -> KeyMap:
    """Our parameters and the tensors of a diffusers HunyuanVideo transformer they are made of."""
    hunyuan = HunyuanConfig.from_json(config)
    own: dict[str, tuple[str, ...]] = {"image_in": ("x_embedder.proj",), "refiner.text_in": ("context_embedder.proj_in",)}
    for ours, theirs in {"time_embedder": "timestep_embedder", "pooled_embedder": "text_embedder"}.items():
        for half in ("linear_1", "linear_2"):
            own[f"refiner.{ours}.{half}"] = (f"context_embedder.time_text_embed.{theirs}.{half}",)
    names = {"norm": "norm1", "mlp_norm": "norm2", "out": "attn.to_out.0", "up": "ff.net.0.proj", "down": "ff.net.2"}
    for i in range(hunyuan.num_refiner_layers):
        block, theirs = f"refiner.layers.{i}", f"context_embedder.token_refiner.refiner_blocks.{i}"
        own |= {f"{block}.{ours}": (f"{theirs}.{name}",) for ours, name in (*names.items(), ("gates", "norm_out.linear"))}
        own[f"{block}.qkv"] = tuple(f"{theirs}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
    return dual_stream.key_map(hunyuan.sizes, own)


# -------------------------------------------------------------------------------------------------- pipeline and specs
def layout(config: HunyuanConfig, vae: Mapping[str, Any]) -> Latents:
    """The VAE's latents in the transformer's patches; `vae` is its config."""
    return Latents(
        channels=config.latent_channels,
        factor=vae.get("spatial_compression_ratio", 8),
        scaling=float(vae.get("scaling_factor", 0.476986)),
        shift=0.0,
        frame_factor=vae.get("temporal_compression_ratio", 4),
        patch=(1, config.patch_size, config.patch_size),
        dtype=torch.float32,
        lead=1 if config.image_condition_type == CONCAT else 0,
    )


def pipeline(parts: Mapping[str, Any], settings: StageSettings) -> tuple[Stage, ...]:
    """Text to video as `HunyuanVideoPipeline` does it."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    denoiser, vae = parts["transformer"], parts["vae"]
    latents = layout(denoiser.config, vae.config)
    lanes = Lanes(denoiser, Phase(FlowMatchEuler(parts["scheduler"]), latents), settings)
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    encoder = HunyuanTextEncoder(*(parts[name] for name in names), **DEFAULT_PROMPT_TEMPLATE)
    return (
        EncodeText(encoder, TRUE_CFG, settings.prompt_cache_bytes),
        PrepareLatents(lanes),
        Denoise(lanes, TRUE_CFG, LatentPreview(vae, latents), text_in_sequence=True),
        DecodeVideo(HunyuanDecoder(vae, latents), latents, settings.decoding),
    )


def fast_pipeline(parts: Mapping[str, Any], settings: StageSettings) -> tuple[Stage, ...]:
    """The same on the schedule that FastHunyuan was distilled on."""
    parts["scheduler"].set_shift(FAST_SHIFT)
    return pipeline(parts, settings)


def image_pipeline(parts: Mapping[str, Any], settings: StageSettings) -> tuple[Stage, ...]:
    """Image to video as `HunyuanVideoImageToVideoPipeline` does it."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE

    denoiser, vae = parts["transformer"], parts["vae"]
    kind, latents = denoiser.config.image_condition_type, layout(denoiser.config, vae.config)
    lanes = Lanes(denoiser, Phase(FlowMatchEuler(parts["scheduler"], most_noise=NOISE), latents), settings)
    encoder = HunyuanPictureEncoder(parts, DEFAULT_PROMPT_TEMPLATE, EVERY[kind])
    return (
        EncodeTextAndPicture(encoder, TRUE_CFG, settings.prompt_cache_bytes),
        EncodeStill(vae, latents, gives=kind == REPLACE),
        PrepareLatents(lanes),
        Denoise(lanes, TRUE_CFG, LatentPreview(vae, latents), text_in_sequence=True),
        DecodeVideo(HunyuanDecoder(vae, latents), latents, settings.decoding),
    )


def _is(pipeline_class: str, *, guidance: bool, concat: bool | None = None) -> Matches:
    """Whether a repository is this member of the family; `concat` None is either."""

    def matches(index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        found = index.get("_class_name"), bool(config.get("guidance_embeds", True))
        return found == (pipeline_class, guidance) and concat in (None, config.get("image_condition_type") == CONCAT)

    return matches


def _takes(*kinds: str | None) -> Callable[[Mapping[str, Any]], HunyuanVideo]:
    """What builds a denoiser of a pipeline that conditions on pictures in one of these ways."""

    def build(config: Mapping[str, Any]) -> HunyuanVideo:
        made = HunyuanConfig.from_json(config)
        if (kind := made.image_condition_type) not in kinds:
            right = " or ".join(map(repr, kinds))
            raise WeightsError(
                f"transformer/config.json: image_condition_type = {kind!r}, where this kind of pipeline takes {right}",
                param="image_condition_type",
            )
        return HunyuanVideo(made)

    return build


T2V = ModelSpec(
    name="hunyuanvideo",
    family="hunyuan_video",
    pipeline_class="HunyuanVideoPipeline",
    hub_ids=("hunyuanvideo-community/HunyuanVideo",),
    tasks=(Task.TEXT_TO_VIDEO,),
    defaults=SamplingParams(
        width=1280,
        height=720,
        num_inference_steps=50,
        guidance_scale=6.0,
        true_cfg_scale=1.0,
        num_outputs=1,
        max_sequence_length=256,
        strength=1.0,
        num_frames=129,
        fps=24,
    ),
    limits=Limits(max_frames=1025),
    parts={
        "transformer": Part("transformer", "dit", ("HunyuanVideoTransformer3DModel",)),
        "vae": Part("vae", "vae", ("AutoencoderKLHunyuanVideo",)),
        "text_encoder": Part("text_encoder", "text_encoder", ("LlamaModel",)),
        "tokenizer": Part("tokenizer", "tokenizer", ("LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast")),
        "text_encoder_2": Part("text_encoder_2", "text_encoder", ("CLIPTextModel",)),
        "tokenizer_2": Part("tokenizer_2", "tokenizer", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "scheduler": Part("scheduler", "scheduler", ("FlowMatchEulerDiscreteScheduler",)),
    },
    matches=_is("HunyuanVideoPipeline", guidance=True),
    build_denoiser=_takes(None),
    key_map=key_map,
    latents=lambda config, vae: layout(HunyuanConfig.from_json(config), vae),
    pipeline=pipeline,
    has_guidance=True,
    vendor_patterns=("sliding_tile_attn", "video_sparse_attn"),
    teacache=(7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),  # of TeaCache4HunyuanVideo
    tiny={
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 24,
        "rope_axes_dim": [4, 4, 4],
    },
)
# what its files say is what HunyuanVideo's say: only the name tells
FAST = replace(
    T2V,
    name="fasthunyuan",
    hub_ids=("FastVideo/FastHunyuan-diffusers",),
    defaults=replace(T2V.defaults, num_inference_steps=6, num_frames=125),
    pipeline=fast_pipeline,
    teacache=(),
)
UNDISTILLED = replace(
    T2V,
    name="hunyuanvideo-without-guidance",
    hub_ids=(),
    matches=_is("HunyuanVideoPipeline", guidance=False),
    has_guidance=False,
    teacache=(),
    tiny={**T2V.tiny, "guidance_embeds": False},
)
I2V = replace(
    T2V,
    name="hunyuanvideo-i2v",
    pipeline_class=IMAGE_PIPELINE,
    hub_ids=("hunyuanvideo-community/HunyuanVideo-I2V",),
    tasks=(Task.IMAGE_TO_VIDEO,),
    parts={
        **T2V.parts,
        "text_encoder": Part("text_encoder", "text_encoder", ("LlavaForConditionalGeneration",)),
        "image_processor": Part("image_processor", "image_processor", CLIP_PROCESSORS),
    },
    matches=_is(IMAGE_PIPELINE, guidance=True, concat=False),
    build_denoiser=_takes(REPLACE, CONCAT),
    pipeline=image_pipeline,
    teacache=(),
    tiny={**T2V.tiny, "image_condition_type": REPLACE},
)
I2V_UNDISTILLED = replace(
    I2V,
    name="hunyuanvideo-i2v-without-guidance",
    hub_ids=(),
    matches=_is(IMAGE_PIPELINE, guidance=False, concat=False),
    has_guidance=False,
    tiny={**I2V.tiny, "guidance_embeds": False},
)
I2V_33 = replace(
    I2V_UNDISTILLED,
    name="hunyuanvideo-i2v-33ch",
    hub_ids=("hunyuanvideo-community/HunyuanVideo-I2V-33ch",),
    defaults=replace(T2V.defaults, num_frames=125),
    matches=_is(IMAGE_PIPELINE, guidance=False, concat=True),
    tiny={**I2V_UNDISTILLED.tiny, "image_condition_type": CONCAT, "in_channels": 9},
)
I2V_33_DISTILLED = replace(
    I2V_33,
    name="hunyuanvideo-i2v-33ch-with-guidance",
    hub_ids=(),
    matches=_is(IMAGE_PIPELINE, guidance=True, concat=True),
    has_guidance=True,
    tiny={**I2V_33.tiny, "guidance_embeds": True},
)

SPECS = (T2V, FAST, UNDISTILLED, I2V, I2V_UNDISTILLED, I2V_33, I2V_33_DISTILLED)

"""FLUX.1: a flow-matching transformer of double-stream, then single-stream blocks (`dev` and `schnell`).

Reference: diffusers `FluxTransformer2DModel` and `FluxPipeline`; BFL's `flux/model.py`. Notable choices:
queries, keys and values are one matrix; the modulation of every block at every step of a request is one table made
beforehand, and so are the rotary table and the text's embedding; a step touches only what depends on the latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.errors import WeightsError
from stepwell.guidance import TRUE_CFG
from stepwell.models.configs import check_sizes, read_config
from stepwell.models.flux_original import ORIGINAL
from stepwell.models.spec import KeyMap, ModelSpec, Part
from stepwell.ops.attention import Attention
from stepwell.ops.blocks import Blocks, Rows
from stepwell.ops.layers import TIME_CHANNELS, Embedder, FeedForward, QueryKeyNorm, time_features
from stepwell.ops.linear import Linear, LinearGelu
from stepwell.ops.modulate import gated_add
from stepwell.ops.packing import JointLayout, Lane, Segments
from stepwell.ops.rope import rotary_table
from stepwell.ops.rows import RowMaths
from stepwell.samplers.flow import FlowMatchEuler
from stepwell.stages.base import Stage, StageSettings
from stepwell.stages.decode import DecodeImage
from stepwell.stages.denoise import Denoise
from stepwell.stages.image import EncodeImage
from stepwell.stages.latents import Grid, Lanes, Latents, Phase, PrepareLatents
from stepwell.stages.preview import LatentPreview
from stepwell.stages.text import Conditioning, EncodeText, FluxTextEncoder
from stepwell.types import Limits, SamplingParams, Task

KEPT_PARTS = 4  # batches of some of a batch's lanes: a step cache asks for any of 2^lanes, mostly for those of the last step


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
        if (
            sum(made.axes_dims_rope) != made.attention_head_dim
            or len(made.axes_dims_rope) != 3
            or any(d % 2 for d in made.axes_dims_rope)
        ):
            raise WeightsError(
                f"axes_dims_rope {made.axes_dims_rope} must be three even numbers that sum to attention_head_dim "
                f"{made.attention_head_dim}",
                param="axes_dims_rope",
            )
        if made.patch_size != 1:
            raise WeightsError(f"patch_size {made.patch_size} is not supported, FLUX.1 has 1", param="patch_size")
        return made

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


# --------------------------------------------------------------------------------- what is constant over a request
@dataclass(frozen=True, slots=True)
class FluxPrepared:
    """One guidance branch of one sample: everything that does not depend on the latents."""

    text: Tensor  # (text tokens, width)
    modulation: Tensor  # (steps, modulation width), each scale with its "1 +" added
    rotary: Tensor  # (text + image tokens, head_dim / 2) complex64

    @property
    def prefix(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True)
class FluxPacked:
    """A set of lanes, laid out as one packed batch."""

    lanes: tuple[Lane, ...]
    layout: JointLayout
    text: Tensor  # (text tokens of all, width)
    rotary: Tensor  # (joint tokens of all, head_dim / 2) complex64
    parts: dict[tuple[int, ...], FluxPacked] = field(default_factory=dict)  # the last batches of some of the lanes

    @classmethod
    def of(cls, lanes: Sequence[Lane]) -> FluxPacked:
        prepared: list[FluxPrepared] = [lane.prepared for lane in lanes]
        text = torch.cat([p.text for p in prepared]) if len(prepared) > 1 else prepared[0].text
        rotary = torch.cat([p.rotary for p in prepared]) if len(prepared) > 1 else prepared[0].rotary
        return cls(tuple(lanes), JointLayout(lanes), text, rotary)

    def only(self, places: tuple[int, ...]) -> FluxPacked:
        found = self.parts.pop(places, None) or FluxPacked.of([self.lanes[place] for place in places])
        self.parts[places] = found  # behind the others: the first one is the one not asked for for longest
        if len(self.parts) > KEPT_PARTS:
            del self.parts[next(iter(self.parts))]
        return found


Streams = tuple[Tensor, Tensor]  # text and image, each packed by itself


@dataclass(frozen=True, slots=True)
class FluxCall:
    """What the blocks of one forward share: the batch, and every modulation of this step.

    table: (modulations, width) for one sequence, else (sequences, modulations, width); `vectors` are its rows, (width,)
    or (sequences, width), and a block knows the place of its own.
    """

    packed: FluxPacked
    table: Tensor
    vectors: tuple[Tensor, ...]

    @classmethod
    def of(cls, packed: FluxPacked, table: Tensor) -> FluxCall:
        return cls(packed, table, table.unbind(-2))

    @property
    def layout(self) -> JointLayout:
        return self.packed.layout

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self.packed.lanes

    def joint(self, x: Streams | Tensor) -> Tensor:
        """(joint tokens, width), whichever form the blocks have left the tokens in"""
        return x if isinstance(x, Tensor) else self.layout.join(*x)

    def image(self, x: Streams | Tensor) -> Tensor:
        """(image tokens, width)"""
        return self.layout.image_of(x) if isinstance(x, Tensor) else x[1]

    def split(self, x: Streams | Tensor) -> list[Rows]:
        """(image rows, text rows) of every sequence"""
        if isinstance(x, Tensor):
            joint = self.layout.joint.split(x)
            return [(rows[lane.prefix :], rows[: lane.prefix]) for lane, rows in zip(self.lanes, joint, strict=True)]
        text, image = x
        return list(zip(self.layout.image.split(image), self.layout.text.split(text), strict=True))

    def join(self, rows: Sequence[Rows]) -> Streams:
        images, texts = zip(*rows, strict=True)
        return (texts[0], images[0]) if len(rows) == 1 else (torch.cat(texts), torch.cat(images))

    def only(self, places: Sequence[int]) -> FluxCall:
        if len(places) == len(self.lanes):
            return self
        table = self.table[places[0]] if len(places) == 1 else self.table[list(places)]
        return FluxCall.of(self.packed.only(tuple(places)), table)


# ------------------------------------------------------------------------------------------------------------ layers
class Stream(nn.Module):
    """One modality's weights in a double block."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.qkv = Linear(width, 3 * width)
        self.norm = QueryKeyNorm(head_dim)
        self.out = Linear(width, width)
        self.mlp = FeedForward(width, 4 * width)
        self.rows = RowMaths()

    def finish(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], segments: Segments) -> Tensor:
        """The rest of the block after attention: project, add, feed forward, add."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        update = self.out(attended, segments)
        x, y = self.rows.gated_add_norm(x, gate, update, mlp_shift, mlp_scale, segments)
        return gated_add(x, mlp_gate, self.mlp(y, segments), segments)


class DoubleBlock(nn.Module):
    """Text and image keep their own weights and attend together."""

    def __init__(self, config: FluxConfig, place: int):
        super().__init__()
        self.heads, self.head_dim, self.place = config.num_attention_heads, config.attention_head_dim, place
        self.image = Stream(config.width, config.attention_head_dim)
        self.text = Stream(config.width, config.attention_head_dim)
        self.rows = RowMaths()
        self.attention = Attention()

    def modulated(self, x: Streams, call: FluxCall) -> tuple[Tensor, ...]:
        """What attention sees of the image, per sequence: (image tokens, width)"""
        shift, scale = call.vectors[self.place : self.place + 2]
        return call.layout.image.split(self.rows.modulated_norm(x[1], shift, scale, call.layout.image))

    def forward(self, x: Streams, call: FluxCall) -> Streams:
        text, image = x
        layout = call.layout
        for_image, for_text = call.vectors[self.place : self.place + 6], call.vectors[self.place + 6 : self.place + 12]
        qkv = layout.join(
            self.text.qkv(self.rows.modulated_norm(text, for_text[0], for_text[1], layout.text), layout.text),
            self.image.qkv(self.rows.modulated_norm(image, for_image[0], for_image[1], layout.image), layout.image),
        ).view(-1, 3, self.heads, self.head_dim)
        weights = (self.text.norm.per_token(), self.image.norm.per_token())
        queries, keys = self.rows.norm_rotate(qkv[:, :2], weights, call.packed.rotary, layout).unbind(1)
        attended = self.attention(queries, keys, qkv[:, 2], layout.joint)
        text = self.text.finish(text, layout.text_of(attended), for_text, layout.text)
        image = self.image.finish(image, layout.image_of(attended), for_image, layout.image)
        return text, image


class SingleBlock(nn.Module):
    """Text and image share the weights; attention and the feed-forward run side by side."""

    def __init__(self, config: FluxConfig, place: int):
        super().__init__()
        width = config.width
        self.heads, self.head_dim, self.place = config.num_attention_heads, config.attention_head_dim, place
        self.qkv = Linear(width, 3 * width)
        self.norm = QueryKeyNorm(config.attention_head_dim)
        self.mlp = LinearGelu(width, 4 * width)
        self.out = Linear(5 * width, width)
        self.rows = RowMaths()
        self.attention = Attention()

    def modulated(self, x: Streams | Tensor, call: FluxCall) -> tuple[Tensor, ...]:
        """What attention sees of the image, per sequence: (image tokens, width)"""
        shift, scale, _ = call.vectors[self.place : self.place + 3]
        return tuple(rows[0] for rows in call.split(self.rows.modulated_norm(call.joint(x), shift, scale, call.layout.joint)))

    def forward(self, x: Streams | Tensor, call: FluxCall) -> Tensor:
        x = call.joint(x)
        shift, scale, gate = call.vectors[self.place : self.place + 3]
        segments = call.layout.joint
        y = self.rows.modulated_norm(x, shift, scale, segments)
        qkv = self.qkv(y, segments).view(-1, 3, self.heads, self.head_dim)
        weights = (self.norm.per_token(),)
        queries, keys = self.rows.norm_rotate(qkv[:, :2], weights, call.packed.rotary, call.layout).unbind(1)
        attended = self.attention(queries, keys, qkv[:, 2], segments)
        return gated_add(x, gate, self.out(torch.cat((attended, self.mlp(y, segments)), dim=-1), segments), segments)


# ------------------------------------------------------------------------------------------------------- transformer
class Flux(nn.Module):
    """The denoiser. `prepare` once per request and branch, `pack` once per set of samples, `forward` every step."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.image_in = Linear(config.in_channels, width)
        self.text_in = nn.Linear(config.joint_attention_dim, width)
        self.time_embedder = Embedder(TIME_CHANNELS, width)
        self.pooled_embedder = Embedder(config.pooled_projection_dim, width)
        self.guidance_embedder = Embedder(TIME_CHANNELS, width) if config.guidance_embeds else None
        self.double_modulations = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(2 * config.num_layers))
        self.single_modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(config.num_single_layers))
        self.out_modulation = nn.Linear(width, 2 * width)
        singles = 12 * config.num_layers
        double = [DoubleBlock(config, 12 * i) for i in range(config.num_layers)]
        single = [SingleBlock(config, singles + 3 * i) for i in range(config.num_single_layers)]
        self.blocks = Blocks([*double, *single])
        self.rows = RowMaths()
        self.image_out = Linear(width, config.out_channels or config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.text_in.bias.dtype

    @property
    def device(self) -> torch.device:
        return self.text_in.bias.device

    def prepare(self, conditioning: Conditioning, timesteps: Tensor, grid: Grid, guidance: float) -> FluxPrepared:
        """Compute all that a request's steps share.

        conditioning: T5 states (tokens, joint_attention_dim) and CLIP's pooled vector (pooled_projection_dim);
        timesteps: (steps,) in [0, 1000]; grid: of image tokens, one frame; guidance: the distilled guidance scale.
        """
        dtype, device = self.dtype, self.device
        pooled = conditioning.pooled.to(device, dtype)[None]
        # rounded as the reference pipeline rounds: to the latents' precision, then as a fraction of 1000
        time = (timesteps.to(conditioning.states.dtype) / 1000).to(device, dtype) * 1000
        vector = self.time_embedder(time_features(time).to(dtype))
        if self.guidance_embedder is not None:
            scale = torch.full((1,), guidance, device=device).to(dtype) * 1000
            vector = vector + self.guidance_embedder(time_features(scale).to(dtype))
        vector = F.silu(vector + self.pooled_embedder(pooled))
        text = self.text_in(conditioning.states.to(device, dtype))
        return FluxPrepared(
            text=text,
            modulation=self._modulation_table(vector),
            rotary=rotary_table(_positions(len(text), grid).to(device), self.config.axes_dims_rope),
        )

    def _modulation_table(self, vector: Tensor) -> Tensor:
        """(steps, width) -> (steps, modulation width)"""
        width = self.config.width
        layers = [*self.double_modulations, *self.single_modulations, self.out_modulation]
        table = torch.cat([layer(vector) for layer in layers], dim=1)
        rows = table.unflatten(1, (-1, width))  # shift, scale, gate; … ; scale, shift of the output norm
        scales = [3 * i + 1 for i in range((rows.shape[1] - 2) // 3)] + [rows.shape[1] - 2]
        rows[:, scales] += 1
        return table

    def pack(self, lanes: Sequence[Lane]) -> FluxPacked:
        """Lay lanes out as one batch; lanes of equal lengths should be neighbours."""
        return FluxPacked.of(lanes)

    def forward(self, latents: Tensor, packed: FluxPacked) -> Tensor:
        """Predict the velocity, each lane at its own step. latents: (image tokens of all, in_channels)"""
        rows = [lane.prepared.modulation[lane.step].view(-1, self.config.width) for lane in packed.lanes]
        call = FluxCall.of(packed, torch.stack(rows) if len(rows) > 1 else rows[0])
        layout = packed.layout
        x = self.blocks((packed.text, self.image_in(latents, layout.image)), call)
        scale, shift = call.vectors[-2:]
        return self.image_out(self.rows.modulated_norm(call.image(x), shift, scale, layout.image), layout.image)


def _positions(text_tokens: int, grid: Grid) -> Tensor:
    """(text + image tokens, 3): text sits at the origin, image tokens at (0, row, column)"""
    _, rows, columns = grid
    image = torch.zeros(rows, columns, 3)
    image[..., 1] = torch.arange(rows)[:, None]
    image[..., 2] = torch.arange(columns)[None]
    return torch.cat((torch.zeros(text_tokens, 3), image.flatten(0, 1)))


# ------------------------------------------------------------------------------------------------------- checkpoints
def key_map(config: Mapping[str, Any]) -> KeyMap:
    """Our parameters and the tensors of a diffusers FLUX.1 transformer they are made of."""
    flux = FluxConfig.from_json(config)
    layers: dict[str, tuple[str, ...]] = {
        "image_in": ("x_embedder",),
        "text_in": ("context_embedder",),
        "image_out": ("proj_out",),
        "out_modulation": ("norm_out.linear",),
    }
    embedders = {"time_embedder": "timestep_embedder", "pooled_embedder": "text_embedder"}
    if flux.guidance_embeds:
        embedders["guidance_embedder"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        for half in ("linear_1", "linear_2"):
            layers[f"{ours}.{half}"] = (f"time_text_embed.{theirs}.{half}",)
    norms: dict[str, tuple[str, ...]] = {}
    for i in range(flux.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        layers[f"double_modulations.{2 * i}"] = (f"{theirs}.norm1.linear",)
        layers[f"double_modulations.{2 * i + 1}"] = (f"{theirs}.norm1_context.linear",)
        streams = {
            "image": ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", "ff"),
            "text": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k", "ff_context"),
        }
        for stream, (q, k, v, out, norm_q, norm_k, mlp) in streams.items():
            layers[f"{ours}.{stream}.qkv"] = tuple(f"{theirs}.attn.{name}" for name in (q, k, v))
            layers[f"{ours}.{stream}.out"] = (f"{theirs}.attn.{out}",)
            layers[f"{ours}.{stream}.mlp.up"] = (f"{theirs}.{mlp}.net.0.proj",)
            layers[f"{ours}.{stream}.mlp.down"] = (f"{theirs}.{mlp}.net.2",)
            norms[f"{ours}.{stream}.norm.weight"] = (f"{theirs}.attn.{norm_q}.weight", f"{theirs}.attn.{norm_k}.weight")
    for i in range(flux.num_single_layers):
        ours, theirs = f"blocks.{flux.num_layers + i}", f"single_transformer_blocks.{i}"
        layers[f"single_modulations.{i}"] = (f"{theirs}.norm.linear",)
        layers[f"{ours}.qkv"] = tuple(f"{theirs}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
        layers[f"{ours}.mlp"] = (f"{theirs}.proj_mlp",)
        layers[f"{ours}.out"] = (f"{theirs}.proj_out",)
        norms[f"{ours}.norm.weight"] = (f"{theirs}.attn.norm_q.weight", f"{theirs}.attn.norm_k.weight")
    tensors = {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    }
    return {**tensors, **norms}


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
    lanes = Lanes(denoiser, Phase(FlowMatchEuler(parts["scheduler"]), latents), settings.teacache)
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

"""Wan 2.1 and 2.2: a video transformer with cross-attention to the prompt, and to a picture where one starts the video.

Reference: diffusers `WanTransformer3DModel`, `WanPipeline` and `WanImageToVideoPipeline`. Notable choices: the keys and values
of every cross-attention are made once per request, the padding of a prompt collapsed into one key; the modulation of a step is
one addition; frames that are given (TI2V) have rows of their own in it, as their time is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.errors import WeightsError
from stepwell.guidance import NO_CFG, PLAIN_CFG
from stepwell.models.configs import check_sizes, read_config
from stepwell.models.spec import KeyMap, Matches, ModelSpec, Part
from stepwell.ops import cross
from stepwell.ops.attention import Attention
from stepwell.ops.blocks import Blocks, Rows
from stepwell.ops.cross import Context
from stepwell.ops.layers import Embedder, FeedForward, QueryKeyNorm, time_features
from stepwell.ops.linear import Linear
from stepwell.ops.modulate import gated_add
from stepwell.ops.norm import rms_norm
from stepwell.ops.packing import JointLayout, Lane, Segments
from stepwell.ops.rope import rotary_table
from stepwell.ops.rows import RowMaths
from stepwell.samplers.base import Sampler
from stepwell.samplers.dmd import Dmd
from stepwell.samplers.flow import FlowMatchEuler
from stepwell.samplers.unipc import UniPC
from stepwell.stages.base import Stage, StageSettings
from stepwell.stages.denoise import Denoise, DenoiseLate
from stepwell.stages.latents import Grid, Lanes, Latents, Phase, PrepareLatents, SwitchDenoiser
from stepwell.stages.preview import LatentPreview
from stepwell.stages.text import Conditioning, EncodeText, Umt5Encoder
from stepwell.stages.video import DecodeVideo, EncodeFirstFrame, ImageEncoder, WanDecoder
from stepwell.types import Limits, SamplingParams, Task

EPS = 1e-6
FAST = "WanDMDPipeline"  # FastWan: distilled to three steps without guidance
PER_BLOCK, LAST = 6, 2  # vectors that modulate a block, and the output


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True, slots=True)
class WanConfig:
    """The denoiser's config.json; names and defaults are those of diffusers."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = EPS
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> WanConfig:
        made = read_config(cls, config, "Wan")
        sizes = {
            "num_attention_heads": made.num_attention_heads,
            "in_channels": made.in_channels,
            "out_channels": made.channels_out,
            "text_dim": made.text_dim,
            "ffn_dim": made.ffn_dim,
            "patch_size": min(made.patch_size),
            "rope_max_seq_len": made.rope_max_seq_len,
        }
        check_sizes(sizes, made.num_layers)
        refused: dict[str, bool] = {
            "patch_size": made.patch_size[0] != 1,
            "qk_norm": made.qk_norm != "rms_norm_across_heads",
            "eps": made.eps != EPS,
            "pos_embed_seq_len": made.pos_embed_seq_len is not None,
            "freq_dim": made.freq_dim < 2 or made.freq_dim % 2 != 0,
            "attention_head_dim": made.attention_head_dim < 6 or made.attention_head_dim % 2 != 0,
            "added_kv_proj_dim": made.added_kv_proj_dim != (None if made.image_dim is None else made.width),
        }
        for name, is_odd in refused.items():
            if is_odd:
                raise WeightsError(f"transformer/config.json: {name} = {config.get(name)!r} is not supported", param=name)
        return made

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels_out(self) -> int:
        return self.out_channels or self.in_channels

    @property
    def patch(self) -> int:
        """Latent pixels of a token."""
        return self.patch_size[0] * self.patch_size[1] * self.patch_size[2]

    @property
    def axes(self) -> tuple[int, int, int]:
        """Channels of a head that turn with the frame, the row and the column."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side


# --------------------------------------------------------------------------------- what is constant over a request
@dataclass(frozen=True, slots=True)
class WanPrepared:
    """One guidance branch of one sample: everything that does not depend on the latents."""

    modulation: Tensor  # (steps, 8, width) of tokens that are denoised, each scale with its "1 +" added
    still: Tensor | None  # (8, width) of those that are given
    given: int  # how many those are
    contexts: tuple[tuple[Context, ...], ...]  # per block: the prompt's, and the picture's if there is one
    rotary: Tensor  # (tokens, head_dim / 2) complex64

    @property
    def prefix(self) -> int:
        """Tokens of text in the sequence: it stays outside."""
        return 0


@dataclass(frozen=True, slots=True)
class WanPacked:
    """A set of lanes, laid out as one packed batch. `rows` are what shares a modulation: a lane's given tokens, its others."""

    lanes: tuple[Lane, ...]
    layout: JointLayout
    rows: Segments
    rotary: Tensor  # (tokens of all, head_dim / 2) complex64

    @classmethod
    def of(cls, lanes: Sequence[Lane]) -> WanPacked:
        prepared: list[WanPrepared] = [lane.prepared for lane in lanes]
        rotary = torch.cat([p.rotary for p in prepared]) if len(prepared) > 1 else prepared[0].rotary
        lengths = [n for lane, p in zip(lanes, prepared, strict=True) for n in _row_lengths(lane.tokens, p.given)]
        return cls(tuple(lanes), JointLayout(lanes), Segments(lengths), rotary)


def _row_lengths(tokens: int, given: int) -> list[int]:
    return [given, tokens - given] if 0 < given < tokens else [tokens]


@dataclass(frozen=True, slots=True)
class WanCall:
    """What the blocks of one forward share.

    tables: (6 · blocks + 2, width), what is learned of every modulation; vectors: all of this step's, (width,) each, or
    (rows, width).
    """

    packed: WanPacked
    tables: Tensor
    vectors: tuple[Tensor, ...]

    @classmethod
    def of(cls, packed: WanPacked, tables: Tensor) -> WanCall:
        rows = [row for lane in packed.lanes for row in _modulations(lane)]
        steps = torch.stack(rows) if len(rows) > 1 else rows[0]  # (8, width), or (rows, 8, width)
        copies = (*(1,) * (steps.ndim - 2), (len(tables) - LAST) // PER_BLOCK, 1)
        table = torch.cat((steps[..., :PER_BLOCK, :].repeat(copies), steps[..., PER_BLOCK:, :]), dim=-2)
        return cls(packed, tables, table.add_(tables).unbind(-2))

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self.packed.lanes

    @property
    def segments(self) -> Segments:
        return self.packed.layout.joint

    def split(self, x: Tensor) -> list[Rows]:
        """The rows of every sequence"""
        return [(rows,) for rows in self.segments.split(x)]

    def join(self, rows: Sequence[Rows]) -> Tensor:
        return rows[0][0] if len(rows) == 1 else torch.cat([video for (video,) in rows])

    def only(self, places: Sequence[int]) -> WanCall:
        if len(places) == len(self.lanes):
            return self
        return WanCall.of(WanPacked.of([self.lanes[place] for place in places]), self.tables)


def _modulations(lane: Lane) -> list[Tensor]:
    """(8, width) for each of a lane's rows, at its step"""
    prepared: WanPrepared = lane.prepared
    moving = prepared.modulation[lane.step]
    if prepared.still is None or prepared.given == 0:
        return [moving]
    return [prepared.still, moving] if prepared.given < lane.tokens else [prepared.still]


# ------------------------------------------------------------------------------------------------------------ layers
class CrossKeys(nn.Module):
    """Makes the keys and values that a block's cross-attention looks at, once per request."""

    def __init__(self, width: int, *, has_image: bool):
        super().__init__()
        self.kv = nn.Linear(width, 2 * width)
        self.norm = nn.Parameter(torch.ones(width))
        self.image_kv = nn.Linear(width, 2 * width) if has_image else None
        self.image_norm = nn.Parameter(torch.ones(width)) if has_image else None

    def forward(self, text: Tensor, repeats: int, image: Tensor | None, heads: int) -> tuple[Context, ...]:
        """text, image: (tokens, width); the last token of the text stands for `repeats` equal ones."""
        contexts = [self._context(self.kv(text), self.norm, repeats, heads)]
        if self.image_kv is not None and self.image_norm is not None and image is not None:
            contexts.append(self._context(self.image_kv(image), self.image_norm, 1, heads))
        return tuple(contexts)

    @staticmethod
    def _context(kv: Tensor, norm: Tensor, repeats: int, heads: int) -> Context:
        keys, values = kv.chunk(2, dim=-1)
        keys = (rms_norm(keys.float()) * norm.float()).to(kv.dtype)
        return Context.of(keys.unflatten(-1, (heads, -1)), values.unflatten(-1, (heads, -1)), repeats)


class Block(nn.Module):
    """Attention among the video's tokens, to the prompt and the picture, and a feed-forward."""

    def __init__(self, config: WanConfig, index: int):
        super().__init__()
        width = config.width
        self.heads, self.index = config.num_attention_heads, index
        self.qkv = Linear(width, 3 * width)
        self.norm = QueryKeyNorm(width)
        self.out = Linear(width, width)
        self.cross_norm = nn.LayerNorm(width, EPS) if config.cross_attn_norm else None
        self.cross_q = Linear(width, width)
        self.cross_q_norm = nn.Parameter(torch.ones(width))
        self.cross_out = Linear(width, width)
        self.mlp = FeedForward(width, config.ffn_dim)
        self.rows = RowMaths()
        self.attention = Attention()

    def _vectors(self, call: WanCall) -> tuple[Tensor, ...]:
        return call.vectors[PER_BLOCK * self.index : PER_BLOCK * (self.index + 1)]

    def modulated(self, x: Tensor, call: WanCall) -> tuple[Tensor, ...]:
        """What TeaCache watches: the embedded time of every sequence, (width,), as its reference for Wan does"""
        return tuple(lane.prepared.modulation[lane.step, PER_BLOCK] for lane in call.lanes)

    def forward(self, x: Tensor, call: WanCall) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self._vectors(call)
        rows, segments, packed = call.packed.rows, call.segments, call.packed
        y = self.rows.modulated_norm(x, shift, scale, rows)
        qkv = self.qkv(y, segments).unflatten(-1, (3, self.heads, -1))
        weights = (self.norm.per_token(self.heads),)
        queries, keys = self.rows.norm_rotate(qkv[:, :2], weights, packed.rotary, packed.layout).unbind(1)
        update = self.out(self.attention(queries, keys, qkv[:, 2], segments), segments)
        if self.cross_norm is None:
            x = y = gated_add(x, gate, update, rows)
        else:
            bias, weight = self.cross_norm.bias.expand_as(gate), self.cross_norm.weight.expand_as(gate)
            x, y = self.rows.gated_add_norm(x, gate, update, bias, weight, rows)
        x = x + self._cross(y, call)
        y = self.rows.modulated_norm(x, mlp_shift, mlp_scale, rows)
        return gated_add(x, mlp_gate, self.mlp(y, segments), rows)

    def _cross(self, y: Tensor, call: WanCall) -> Tensor:
        queries = self.cross_q(y, call.segments)
        queries = (rms_norm(queries.float()) * self.cross_q_norm.float()).to(y.dtype).unflatten(-1, (self.heads, -1))
        contexts = [lane.prepared.contexts[self.index] for lane in call.lanes]
        seen = [cross.attend(queries, kind, call.segments) for kind in zip(*contexts, strict=True)]
        return self.cross_out(sum(seen[1:], seen[0]), call.segments)


class ImageEmbedder(nn.Module):
    """An image encoder's tokens, as wide as the model."""

    def __init__(self, image_width: int, width: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(image_width)
        self.up = nn.Linear(image_width, image_width)
        self.down = nn.Linear(image_width, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(self.down(F.gelu(self.up(self.norm_in(x)))))


# ------------------------------------------------------------------------------------------------------- transformer
class Wan(nn.Module):
    """The denoiser. `prepare` once per request and branch, `pack` once per set of samples, `forward` every step."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        width = config.width
        has_image = config.image_dim is not None
        self.video_in = Linear(config.in_channels * config.patch, width)
        self.time_embedder = Embedder(config.freq_dim, width)
        self.time_modulation = nn.Linear(width, PER_BLOCK * width)
        self.text_up, self.text_down = nn.Linear(config.text_dim, width), nn.Linear(width, width)
        self.image_embedder = ImageEmbedder(config.image_dim, width) if config.image_dim is not None else None
        self.cross_keys = nn.ModuleList(CrossKeys(width, has_image=has_image) for _ in range(config.num_layers))
        self.modulation = nn.Parameter(torch.zeros(PER_BLOCK * config.num_layers + LAST, width))
        self.blocks = Blocks([Block(config, index) for index in range(config.num_layers)])
        self.rows = RowMaths()
        self.video_out = Linear(width, config.channels_out * config.patch)

    @property
    def dtype(self) -> torch.dtype:
        return self.text_down.bias.dtype

    @property
    def device(self) -> torch.device:
        return self.text_down.bias.device

    def prepare(self, conditioning: Conditioning, timesteps: Tensor, grid: Grid, guidance: float) -> WanPrepared:
        """Compute all that a request's steps share.

        conditioning: UMT5 states (tokens, text_dim), an image encoder's where the model takes them, how many of the
        first tokens are given; timesteps: (steps,) in [0, 1000]; grid: of tokens. `guidance` is not the denoiser's affair.
        """
        dtype, device = self.dtype, self.device
        states = conditioning.states.to(device, dtype)
        if conditioning.padding:
            states = F.pad(states, (0, 0, 0, 1))
        text = self.text_down(F.gelu(self.text_up(states), approximate="tanh"))
        image = conditioning.image
        if self.image_embedder is not None and image is not None:
            image = self.image_embedder(image.to(device, dtype))
        heads = self.config.num_attention_heads
        return WanPrepared(
            modulation=self._modulation(timesteps),
            still=self._modulation(torch.zeros(1))[0] if conditioning.given else None,
            given=conditioning.given,
            contexts=tuple(keys(text, conditioning.padding, image, heads) for keys in self.cross_keys),
            rotary=rotary_table(_positions(grid).to(device), self.config.axes),
        )

    def _modulation(self, timesteps: Tensor) -> Tensor:
        """(steps,) -> (steps, 8, width): what time adds to the vectors of every block, and to those of the output"""
        features = time_features(timesteps.to(self.device), self.config.freq_dim)
        time = self.time_embedder(features.to(self.dtype))
        blocks = self.time_modulation(F.silu(time)).unflatten(1, (PER_BLOCK, -1))
        table = torch.cat((blocks, time[:, None].expand(-1, LAST, -1)), dim=1)
        table[:, [1, 4, 7]] += 1  # scales
        return table

    def pack(self, lanes: Sequence[Lane]) -> WanPacked:
        """Lay lanes out as one batch; lanes of equal lengths should be neighbours."""
        return WanPacked.of(lanes)

    def forward(self, latents: Tensor, packed: WanPacked) -> Tensor:
        """Predict the velocity, each lane at its own step. latents: (tokens of all, in_channels · patch)"""
        call = WanCall.of(packed, self.modulation)
        x = self.blocks(self.video_in(latents, call.segments), call)
        shift, scale = call.vectors[-LAST:]
        out = self.video_out(self.rows.modulated_norm(x, shift, scale, packed.rows), call.segments)
        return out.unflatten(-1, (self.config.patch, -1)).transpose(1, 2).flatten(1)  # (channel, patch), as the latents


def _positions(grid: Grid) -> Tensor:
    """(tokens, 3): frame, row, column"""
    return torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in grid))


# ------------------------------------------------------------------------------------------------------- checkpoints
def key_map(config: Mapping[str, Any]) -> KeyMap:
    """Our parameters and the tensors of a diffusers Wan transformer they are made of."""
    wan = WanConfig.from_json(config)
    embedder = "condition_embedder"
    layers: dict[str, tuple[str, ...]] = {
        "video_in": ("patch_embedding",),
        "time_embedder.linear_1": (f"{embedder}.time_embedder.linear_1",),
        "time_embedder.linear_2": (f"{embedder}.time_embedder.linear_2",),
        "time_modulation": (f"{embedder}.time_proj",),
        "text_up": (f"{embedder}.text_embedder.linear_1",),
        "text_down": (f"{embedder}.text_embedder.linear_2",),
        "video_out": ("proj_out",),
    }
    if wan.image_dim is not None:
        names = {"norm_in": "norm1", "up": "ff.net.0.proj", "down": "ff.net.2", "norm_out": "norm2"}
        layers |= {f"image_embedder.{ours}": (f"{embedder}.image_embedder.{theirs}",) for ours, theirs in names.items()}
    tables = [f"blocks.{i}.scale_shift_table" for i in range(wan.num_layers)]
    vectors: dict[str, tuple[str, ...]] = {"modulation": (*tables, "scale_shift_table")}
    for i in range(wan.num_layers):
        block, keys = f"blocks.{i}", f"cross_keys.{i}"
        layers[f"{block}.qkv"] = tuple(f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v"))
        layers[f"{block}.out"] = (f"{block}.attn1.to_out.0",)
        layers[f"{block}.cross_q"] = (f"{block}.attn2.to_q",)
        layers[f"{block}.cross_out"] = (f"{block}.attn2.to_out.0",)
        layers[f"{block}.mlp.up"] = (f"{block}.ffn.net.0.proj",)
        layers[f"{block}.mlp.down"] = (f"{block}.ffn.net.2",)
        layers[f"{keys}.kv"] = (f"{block}.attn2.to_k", f"{block}.attn2.to_v")
        vectors[f"{block}.norm.weight"] = (f"{block}.attn1.norm_q.weight", f"{block}.attn1.norm_k.weight")
        vectors[f"{block}.cross_q_norm"] = (f"{block}.attn2.norm_q.weight",)
        vectors[f"{keys}.norm"] = (f"{block}.attn2.norm_k.weight",)
        if wan.cross_attn_norm:
            layers[f"{block}.cross_norm"] = (f"{block}.norm2",)
        if wan.image_dim is not None:
            layers[f"{keys}.image_kv"] = (f"{block}.attn2.add_k_proj", f"{block}.attn2.add_v_proj")
            vectors[f"{keys}.image_norm"] = (f"{block}.attn2.norm_added_k.weight",)
    tensors = {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    }
    return {**tensors, **vectors}


# -------------------------------------------------------------------------------------------------- pipeline and specs
def layout(config: WanConfig, vae: Mapping[str, Any]) -> Latents:
    """The VAE's latents in the transformer's patches, channel by channel to mean 0 and deviation 1; `vae` is its config."""
    return Latents(
        channels=config.channels_out,
        factor=vae.get("scale_factor_spatial", 8),  # that of Wan 2.1 leaves them out
        scaling=1.0 / torch.tensor(vae["latents_std"]).view(-1, 1, 1, 1),
        shift=torch.tensor(vae["latents_mean"]).view(-1, 1, 1, 1),
        frame_factor=vae.get("scale_factor_temporal", 4),
        patch=config.patch_size,
        dtype=torch.float32,
    )


def pipeline(parts: Mapping[str, Any], settings: StageSettings) -> tuple[Stage, ...]:
    """Text to video as `WanPipeline` does it, image to video as `WanImageToVideoPipeline` does."""
    denoiser, vae, index = parts["transformer"], parts["vae"], settings.index
    latents = layout(denoiser.config, vae.config)
    is_distilled = index.get("_class_name") == FAST
    sampler, guider = (Dmd(), NO_CFG) if is_distilled else (_sampler(parts["scheduler"]), PLAIN_CFG)
    late = parts.get("transformer_2")
    boundary = 0.0 if late is None else float(index["boundary_ratio"]) * 1000
    lanes = Lanes(denoiser, Phase(sampler, latents, low=boundary), settings.teacache)
    see = ImageEncoder(parts["image_processor"], parts["image_encoder"]) if "image_encoder" in parts else None
    preview = LatentPreview(vae, latents)
    denoise: tuple[Stage, ...] = (PrepareLatents(lanes), Denoise(lanes, guider, preview, text_in_sequence=False))
    if late is not None:
        late_lanes = Lanes(late, Phase(sampler, latents, high=boundary), settings.teacache)
        denoise += (SwitchDenoiser(late_lanes), DenoiseLate(late_lanes, guider, preview, text_in_sequence=False))
    return (
        EncodeText(Umt5Encoder(parts["tokenizer"], parts["text_encoder"]), guider, settings.prompt_cache_bytes),
        EncodeFirstFrame(vae, latents, see, gives=bool(index.get("expand_timesteps"))),
        *denoise,
        DecodeVideo(WanDecoder(vae, latents), latents),
    )


def _sampler(schedule: Any) -> Sampler:
    """Of the two kinds of schedule a repository may have"""
    return UniPC(schedule) if "solver_order" in schedule.config else FlowMatchEuler(schedule, has_own_levels=True)


PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
_PARTS = {
    "transformer": Part("transformer", "dit", ("WanTransformer3DModel",)),
    "transformer_2": Part("transformer_2", "dit_2", ("WanTransformer3DModel",), is_optional=True),
    "vae": Part("vae", "vae", ("AutoencoderKLWan",)),
    "text_encoder": Part("text_encoder", "text_encoder", ("UMT5EncoderModel",)),
    "tokenizer": Part("tokenizer", "tokenizer", ("T5TokenizerFast", "T5Tokenizer")),
    "image_encoder": Part("image_encoder", "image_encoder", ("CLIPVisionModel",), is_optional=True),
    "image_processor": Part("image_processor", "image_processor", PROCESSORS, is_optional=True),
    "scheduler": Part("scheduler", "scheduler", ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")),
}


def _is(pipeline_class: str, *, layers: int | None = None, late: bool = False, expands: bool = False) -> Matches:
    """Whether a repository is this member of the family, by what differs among its published ones."""

    def matches(index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        has_late = (index.get("transformer_2") or [None])[0] is not None
        is_as_deep = layers is None or config.get("num_layers", 40) >= layers
        found = index.get("_class_name"), has_late, bool(index.get("expand_timesteps"))
        return found == (pipeline_class, late, expands) and is_as_deep

    return matches


T2V_14B = ModelSpec(
    name="wan2.1-t2v-14b",
    family="wan",
    pipeline_class="WanPipeline",
    hub_ids=("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
    tasks=(Task.TEXT_TO_VIDEO,),
    defaults=SamplingParams(
        width=832,
        height=480,
        num_inference_steps=50,
        guidance_scale=5.0,
        true_cfg_scale=1.0,
        num_outputs=1,
        max_sequence_length=512,
        strength=1.0,
        num_frames=81,
        fps=16,
    ),
    limits=Limits(max_frames=1025),
    parts=_PARTS,
    matches=_is("WanPipeline", layers=40),
    build_denoiser=lambda config: Wan(WanConfig.from_json(config)),
    key_map=key_map,
    latents=lambda config, vae: layout(WanConfig.from_json(config), vae),
    pipeline=pipeline,
    unused=("norm_added_q",),
    has_guidance=True,
    vendor_patterns=("sliding_tile_attn", "video_sparse_attn"),
    cfg_field="guidance_scale",
    # of TeaCache4Wan2.1, for the embedded time
    teacache=(-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    tiny={
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
    },
)
T2V_1B = replace(
    T2V_14B,
    name="wan2.1-t2v-1.3b",
    hub_ids=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    matches=_is("WanPipeline"),
    teacache=(2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
)
I2V_14B = replace(
    T2V_14B,
    name="wan2.1-i2v-14b",
    pipeline_class="WanImageToVideoPipeline",
    hub_ids=("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
    tasks=(Task.IMAGE_TO_VIDEO,),
    matches=_is("WanImageToVideoPipeline"),
    teacache=(-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),  # fitted at 480P
    tiny={**T2V_14B.tiny, "in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 24},
)
_EXPERTS = replace(T2V_14B.defaults, width=1280, height=720, num_inference_steps=40, guidance_scale=4.0)
T2V_A14B = replace(
    T2V_14B,
    name="wan2.2-t2v-a14b",
    hub_ids=("Wan-AI/Wan2.2-T2V-A14B-Diffusers",),
    defaults=replace(_EXPERTS, guidance_scale_2=3.0),
    matches=_is("WanPipeline", late=True),
    has_guidance_2=True,
    teacache=(),
)
I2V_A14B = replace(
    T2V_A14B,
    name="wan2.2-i2v-a14b",
    pipeline_class="WanImageToVideoPipeline",
    hub_ids=("Wan-AI/Wan2.2-I2V-A14B-Diffusers",),
    tasks=(Task.IMAGE_TO_VIDEO,),
    defaults=replace(_EXPERTS, guidance_scale=3.5, guidance_scale_2=3.5),
    matches=_is("WanImageToVideoPipeline", late=True),
    tiny={**T2V_14B.tiny, "in_channels": 12},
)
TI2V_5B = replace(
    T2V_14B,
    name="wan2.2-ti2v-5b",
    hub_ids=("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
    tasks=(Task.TEXT_TO_VIDEO, Task.IMAGE_TO_VIDEO),
    defaults=replace(T2V_14B.defaults, width=1280, height=704, num_frames=121, fps=24),
    matches=_is("WanPipeline", expands=True),
    teacache=(),
)
TI2V_5B_IMAGE = replace(
    TI2V_5B,
    name="wan2.2-ti2v-5b-image",
    pipeline_class="WanImageToVideoPipeline",
    hub_ids=(),
    tasks=(Task.IMAGE_TO_VIDEO,),
    matches=_is("WanImageToVideoPipeline", expands=True),
)

# FastWan 2.1 may hold the gates of video sparse attention, which dense attention does without, as its reference does then
FAST_1B = replace(
    T2V_1B,
    name="fastwan2.1-t2v",
    pipeline_class=FAST,
    hub_ids=("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers"),
    defaults=replace(T2V_14B.defaults, num_frames=61, num_inference_steps=3, guidance_scale=1.0),
    limits=replace(T2V_14B.limits, min_steps=3, max_steps=3),
    matches=_is(FAST),
    unused=(*T2V_14B.unused, "to_gate_compress"),
    has_guidance=False,
    vendor_patterns=("sliding_tile_attn",),  # video sparse attention would need the gates
    cfg_field=None,
    teacache=(),
)
FAST_5B = replace(
    FAST_1B,
    name="fastwan2.2-ti2v-5b",
    hub_ids=("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", "FastVideo/FastWan2.2-TI2V-5B-Diffusers"),
    defaults=replace(TI2V_5B.defaults, num_inference_steps=3, guidance_scale=1.0),
    matches=_is(FAST, expands=True),
)

SPECS = (T2V_14B, T2V_1B, I2V_14B, T2V_A14B, I2V_A14B, TI2V_5B, TI2V_5B_IMAGE, FAST_1B, FAST_5B)

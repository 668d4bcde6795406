"""Wan's transformer: self-attention over a video's tokens, cross-attention to the prompt, and to a picture where one starts the
video.

Reference: diffusers `WanTransformer3DModel`. Notable choices: the keys and values of every cross-attention are made once per
request, the padding of a prompt collapsed into one key; the modulation of a step is one addition; frames that are given (TI2V)
have rows of their own in it, as their time is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.errors import WeightsError
from stepwell.models.configs import check_sizes, read_config
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
from stepwell.stages.latents import Grid
from stepwell.stages.text import Conditioning

EPS = 1e-6
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

    def part(self, text: slice, video: slice) -> WanPrepared:
        """Of some of the video's tokens; of text there are none."""
        return replace(self, rotary=self.rotary[video].contiguous(), given=len(range(self.given)[video]))


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

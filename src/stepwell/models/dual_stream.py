"""Text and image in two streams, then in one: the blocks that FLUX.1 and HunyuanVideo share, and how a step runs through them.

Reference: diffusers `FluxTransformer2DModel` and `HunyuanVideoTransformer3DModel`. Notable choices: queries, keys and values are
one matrix; the modulation of every block at every step of a request is one table made beforehand, and so are the rotary
table and the text's embedding; a step touches only what depends on the latents. "Image" stands for a video too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.errors import WeightsError
from stepwell.models.spec import KeyMap
from stepwell.ops.attention import Attention
from stepwell.ops.blocks import Blocks, Rows
from stepwell.ops.layers import TIME_CHANNELS, Embedder, FeedForward, QueryKeyNorm, time_features
from stepwell.ops.linear import Linear, LinearGelu
from stepwell.ops.modulate import gated_add
from stepwell.ops.packing import JointLayout, Lane, Segments
from stepwell.ops.rows import RowMaths
from stepwell.stages.latents import Grid


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the denoiser is made by. width: heads · head_dim; mlp: that of the feed-forward between its linears; doubles, singles:
    how many blocks; channels: those of a token of the latents, in and out; pooled: those of a text's pooled vector."""

    heads: int
    head_dim: int
    mlp: int
    doubles: int
    singles: int
    channels: tuple[int, int]
    pooled: int
    has_guidance: bool

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def check_axes(name: str, axes: Sequence[int], head_dim: int) -> None:
    """Raise WeightsError unless three even numbers of channels make up a head."""
    if sum(axes) != head_dim or len(axes) != 3 or any(d % 2 for d in axes):
        raise WeightsError(
            f"{name} {tuple(axes)} must be three even numbers that sum to attention_head_dim {head_dim}", param=name
        )


KEPT_PARTS = 4  # batches of some of a batch's lanes: a step cache asks for any of 2^lanes, mostly for those of the last step


# --------------------------------------------------------------------------------- what is constant over a request
@dataclass(frozen=True, slots=True)
class DualPrepared:
    """One guidance branch of one sample: everything that does not depend on the latents."""

    text: Tensor  # (steps, text tokens, width)
    modulation: Tensor  # (steps, modulation width), each scale with its "1 +" added
    rotary: Tensor  # (text + image tokens, head_dim / 2) complex64
    still: Tensor | None = None  # (modulation width,) of image tokens that are given
    given: int = 0  # how many those are, the first ones

    @property
    def prefix(self) -> int:
        return self.text.shape[1]

    def part(self, text: slice, image: slice) -> DualPrepared:
        """Of some of the text's tokens and some of the image's."""
        turned = torch.cat((self.rotary[text], self.rotary[self.prefix :][image]))
        given = len(range(self.given)[image])
        return replace(self, text=self.text[:, text].contiguous(), rotary=turned, given=given)


@dataclass(frozen=True, slots=True)
class Runs:
    """What shares a modulation in a packed matrix: where each run of rows lies, and the place of its modulation."""

    rows: Segments
    places: tuple[int, ...]

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int]]) -> Runs:
        """From (rows, place) of each."""
        kept = [run for run in runs if run[0] > 0]
        return cls(Segments([rows for rows, _ in kept]), tuple(place for _, place in kept))

    def vectors(self, table: Tensor) -> tuple[Tensor, ...]:
        """(places, modulations, width) -> per modulation (runs, width), or (width,) for one run"""
        chosen = table[self.places[0]] if len(self.places) == 1 else torch.stack([table[place] for place in self.places])
        return chosen.unbind(-2)


@dataclass(frozen=True, slots=True)
class Stills:
    """What image tokens that are given change in a batch: they are modulated as at time 0.

    table: (lanes that have some, modulation width), whose places come after those of all lanes.
    """

    table: Tensor
    image: Runs
    joint: Runs

    @classmethod
    def of(cls, lanes: Sequence[Lane]) -> Stills | None:
        """None where no token is given."""
        stills: list[Tensor] = []
        image: list[tuple[int, int]] = []
        joint: list[tuple[int, int]] = []
        for place, lane in enumerate(lanes):
            prepared: DualPrepared = lane.prepared
            given = 0 if prepared.still is None else prepared.given
            runs = [(given, len(lanes) + len(stills)), (lane.tokens - given, place)]
            stills += [] if prepared.still is None else [prepared.still]
            image += runs
            joint += [(lane.prefix, place), *runs]
        return cls(torch.stack(stills), Runs.of(image), Runs.of(joint)) if stills else None


@dataclass(frozen=True, slots=True)
class DualPacked:
    """A set of lanes, laid out as one packed batch."""

    lanes: tuple[Lane, ...]
    layout: JointLayout
    rotary: Tensor  # (joint tokens of all, head_dim / 2) complex64
    stills: Stills | None
    parts: dict[tuple[int, ...], DualPacked] = field(default_factory=dict)  # the last batches of some of the lanes

    @classmethod
    def of(cls, lanes: Sequence[Lane]) -> DualPacked:
        prepared: list[DualPrepared] = [lane.prepared for lane in lanes]
        rotary = torch.cat([p.rotary for p in prepared]) if len(prepared) > 1 else prepared[0].rotary
        return cls(tuple(lanes), JointLayout(lanes), rotary, Stills.of(lanes))

    def text(self) -> Tensor:
        """(text tokens of all, width), each lane's at its own step"""
        texts = [lane.prepared.text[lane.step] for lane in self.lanes]
        return torch.cat(texts) if len(texts) > 1 else texts[0]

    def only(self, places: tuple[int, ...]) -> DualPacked:
        found = self.parts.pop(places, None) or DualPacked.of([self.lanes[place] for place in places])
        self.parts[places] = found  # behind the others: the first one is the one not asked for for longest
        if len(self.parts) > KEPT_PARTS:
            del self.parts[next(iter(self.parts))]
        return found


Streams = tuple[Tensor, Tensor]  # text and image, each packed by itself


@dataclass(frozen=True, slots=True)
class DualCall:
    """What the blocks of one forward share: the batch, and every modulation of this step.

    table: (modulations, width) for one sequence, else (sequences, modulations, width); `for_text`, `for_image` and `for_joint`
    are its rows as each matrix needs them, (width,) or (sequences, width), and a block knows the place of its own. Where image
    tokens are given, a sequence has several rows in the last two, which `image_rows` and `joint_rows` place.
    """

    packed: DualPacked
    table: Tensor
    for_text: tuple[Tensor, ...]
    for_image: tuple[Tensor, ...]
    for_joint: tuple[Tensor, ...]

    @classmethod
    def of(cls, packed: DualPacked, table: Tensor) -> DualCall:
        vectors, stills = table.unbind(-2), packed.stills
        if stills is None:
            return cls(packed, table, vectors, vectors, vectors)
        shape = table.shape[-2:]
        every = torch.cat((table.view(-1, *shape), stills.table.view(-1, *shape)))
        return cls(packed, table, vectors, stills.image.vectors(every), stills.joint.vectors(every))

    @property
    def image_rows(self) -> Segments:
        return self.layout.image if self.packed.stills is None else self.packed.stills.image.rows

    @property
    def joint_rows(self) -> Segments:
        return self.layout.joint if self.packed.stills is None else self.packed.stills.joint.rows

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

    def only(self, places: Sequence[int]) -> DualCall:
        if len(places) == len(self.lanes):
            return self
        table = self.table[places[0]] if len(places) == 1 else self.table[list(places)]
        return DualCall.of(self.packed.only(tuple(places)), table)


# ------------------------------------------------------------------------------------------------------------ layers
class Stream(nn.Module):
    """One modality's weights in a double block."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.qkv = Linear(sizes.width, 3 * sizes.width)
        self.norm = QueryKeyNorm(sizes.head_dim)
        self.out = Linear(sizes.width, sizes.width)
        self.mlp = FeedForward(sizes.width, sizes.mlp)
        self.rows = RowMaths()

    def finish(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], segments: Segments, runs: Segments) -> Tensor:
        """The rest of the block after attention: project, add, feed forward, add. `runs`: of rows that share a modulation."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        update = self.out(attended, segments)
        x, y = self.rows.gated_add_norm(x, gate, update, mlp_shift, mlp_scale, runs)
        return gated_add(x, mlp_gate, self.mlp(y, segments), runs)


class DoubleBlock(nn.Module):
    """Text and image keep their own weights and attend together."""

    def __init__(self, sizes: Sizes, place: int):
        super().__init__()
        self.heads, self.head_dim, self.place = sizes.heads, sizes.head_dim, place
        self.image, self.text = Stream(sizes), Stream(sizes)
        self.rows = RowMaths()
        self.attention = Attention()

    def modulated(self, x: Streams, call: DualCall) -> tuple[Tensor, ...]:
        """What attention sees of the image, per sequence: (image tokens, width)"""
        shift, scale = call.for_image[self.place : self.place + 2]
        return call.layout.image.split(self.rows.modulated_norm(x[1], shift, scale, call.image_rows))

    def forward(self, x: Streams, call: DualCall) -> Streams:
        text, image = x
        layout, image_rows = call.layout, call.image_rows
        for_image, for_text = call.for_image[self.place : self.place + 6], call.for_text[self.place + 6 : self.place + 12]
        qkv = layout.join(
            self.text.qkv(self.rows.modulated_norm(text, for_text[0], for_text[1], layout.text), layout.text),
            self.image.qkv(self.rows.modulated_norm(image, for_image[0], for_image[1], image_rows), layout.image),
        ).view(-1, 3, self.heads, self.head_dim)
        weights = (self.text.norm.per_token(), self.image.norm.per_token())
        queries, keys = self.rows.norm_rotate(qkv[:, :2], weights, call.packed.rotary, layout).unbind(1)
        attended = self.attention(queries, keys, qkv[:, 2], layout.joint)
        text = self.text.finish(text, layout.text_of(attended), for_text, layout.text, layout.text)
        image = self.image.finish(image, layout.image_of(attended), for_image, layout.image, image_rows)
        return text, image


class SingleBlock(nn.Module):
    """Text and image share the weights; attention and the feed-forward run side by side."""

    def __init__(self, sizes: Sizes, place: int):
        super().__init__()
        self.heads, self.head_dim, self.place = sizes.heads, sizes.head_dim, place
        self.qkv = Linear(sizes.width, 3 * sizes.width)
        self.norm = QueryKeyNorm(sizes.head_dim)
        self.mlp = LinearGelu(sizes.width, sizes.mlp)
        self.out = Linear(sizes.width + sizes.mlp, sizes.width)
        self.rows = RowMaths()
        self.attention = Attention()

    def modulated(self, x: Streams | Tensor, call: DualCall) -> tuple[Tensor, ...]:
        """What attention sees of the image, per sequence: (image tokens, width)"""
        shift, scale, _ = call.for_joint[self.place : self.place + 3]
        return tuple(rows[0] for rows in call.split(self.rows.modulated_norm(call.joint(x), shift, scale, call.joint_rows)))

    def forward(self, x: Streams | Tensor, call: DualCall) -> Tensor:
        x = call.joint(x)
        shift, scale, gate = call.for_joint[self.place : self.place + 3]
        segments = call.layout.joint
        y = self.rows.modulated_norm(x, shift, scale, call.joint_rows)
        qkv = self.qkv(y, segments).view(-1, 3, self.heads, self.head_dim)
        weights = (self.norm.per_token(),)
        queries, keys = self.rows.norm_rotate(qkv[:, :2], weights, call.packed.rotary, call.layout).unbind(1)
        attended = self.attention(queries, keys, qkv[:, 2], segments)
        return gated_add(x, gate, self.out(torch.cat((attended, self.mlp(y, segments)), dim=-1), segments), call.joint_rows)


# ------------------------------------------------------------------------------------------------------- transformer
class DualStream(nn.Module):
    """The denoiser, but for what embeds the text and for `prepare`, which makes a DualPrepared once per request and branch.

    `pack` once per set of samples, `forward` every step.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, singles = sizes.width, 12 * sizes.doubles
        self.width = width
        self.image_in = Linear(sizes.channels[0], width)
        self.time_embedder = Embedder(TIME_CHANNELS, width)
        self.pooled_embedder = Embedder(sizes.pooled, width)
        self.guidance_embedder = Embedder(TIME_CHANNELS, width) if sizes.has_guidance else None
        self.double_modulations = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(2 * sizes.doubles))
        self.single_modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(sizes.singles))
        self.out_modulation = nn.Linear(width, 2 * width)
        double = [DoubleBlock(sizes, 12 * i) for i in range(sizes.doubles)]
        single = [SingleBlock(sizes, singles + 3 * i) for i in range(sizes.singles)]
        self.blocks = Blocks([*double, *single])
        self.rows = RowMaths()
        self.image_out = Linear(width, sizes.channels[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.out_modulation.bias.dtype

    @property
    def device(self) -> torch.device:
        return self.out_modulation.bias.device

    def modulation(self, time: Tensor, guidance: float | None, pooled: Tensor) -> Tensor:
        """Every block's at every step, (steps, modulation width).

        time: (steps,) in [0, 1000]; guidance: the distilled guidance scale, None to leave it out; pooled: (channels,).
        """
        vector = self.time_embedder(time_features(time).to(self.dtype))
        if self.guidance_embedder is not None and guidance is not None:
            scale = torch.full((1,), guidance, device=self.device).to(self.dtype) * 1000
            vector = vector + self.guidance_embedder(time_features(scale).to(self.dtype))
        vector = F.silu(vector + self.pooled_embedder(pooled.to(self.device, self.dtype)[None]))
        layers = [*self.double_modulations, *self.single_modulations, self.out_modulation]
        table = torch.cat([layer(vector) for layer in layers], dim=1)
        rows = table.unflatten(1, (-1, self.width))  # shift, scale, gate; … ; scale, shift of the output norm
        scales = [3 * i + 1 for i in range((rows.shape[1] - 2) // 3)] + [rows.shape[1] - 2]
        rows[:, scales] += 1
        return table

    def pack(self, lanes: Sequence[Lane]) -> DualPacked:
        """Lay lanes out as one batch; lanes of equal lengths should be neighbours."""
        return DualPacked.of(lanes)

    def forward(self, latents: Tensor, packed: DualPacked) -> Tensor:
        """Predict the velocity, each lane at its own step. latents: (image tokens of all, channels)"""
        rows = [lane.prepared.modulation[lane.step].view(-1, self.width) for lane in packed.lanes]
        call = DualCall.of(packed, torch.stack(rows) if len(rows) > 1 else rows[0])
        layout = packed.layout
        x = self.blocks((packed.text(), self.image_in(latents, layout.image)), call)
        scale, shift = call.for_image[-2:]
        return self.image_out(self.rows.modulated_norm(call.image(x), shift, scale, call.image_rows), layout.image)


def positions(text_tokens: int, grid: Grid) -> Tensor:
    """(text + image tokens, 3): text sits at the origin, image tokens at (frame, row, column)"""
    image = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in grid))
    return torch.cat((torch.zeros(text_tokens, 3), image))


# ------------------------------------------------------------------------------------------------------- checkpoints
def key_map(sizes: Sizes, own: Mapping[str, tuple[str, ...]]) -> KeyMap:
    """Our parameters and the tensors of a diffusers transformer they are made of; `own` are the layers that a family adds."""
    layers: dict[str, tuple[str, ...]] = {"image_out": ("proj_out",), "out_modulation": ("norm_out.linear",), **own}
    embedders = {"time_embedder": "timestep_embedder", "pooled_embedder": "text_embedder"}
    if sizes.has_guidance:
        embedders["guidance_embedder"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        layers |= {f"{ours}.{half}": (f"time_text_embed.{theirs}.{half}",) for half in ("linear_1", "linear_2")}
    norms: dict[str, tuple[str, ...]] = {}
    for i in range(sizes.doubles):
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
    for i in range(sizes.singles):
        ours, theirs = f"blocks.{sizes.doubles + i}", f"single_transformer_blocks.{i}"
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

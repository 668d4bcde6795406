"""Pictures into video latents, and video latents into frames, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stepwell.parallel.ranks import ALONE, Ranks
from stepwell.stages.base import Item, Stage, State
from stepwell.stages.decode import DECODE_COST, to_frames
from stepwell.stages.image import ENCODE_COST, to_pixels
from stepwell.stages.latents import Latents
from stepwell.types import Frames, Request


class EncodeFirstFrame(Stage):
    """The picture a video starts from: as its first frame, which is given (`gives`), or as latents beside those that are
    denoised, with a mask that says which frames it holds; and as an image encoder sees it, where the model has one.

    Reference: diffusers `WanImageToVideoPipeline.prepare_latents` and `encode_image`.
    """

    name = "encode_image"
    kinds = ("vae", "image_encoder")

    def __init__(self, vae: Any, latents: Latents, see: ImageEncoder | None, *, gives: bool):
        self.vae, self.latents, self.see, self.gives = vae, latents, see, gives

    def steps(self, request: Request) -> int:
        return 0 if request.image is None else 1

    def tokens(self, request: Request) -> int:
        return ENCODE_COST * self.latents.tokens(request)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        made = [self._encode(state) for state, _ in items]
        for (state, _), (latents, seen, trace) in zip(items, made, strict=True):
            state.image_latents = trace
            if self.gives:
                state.given = latents
            else:
                state.beside = latents
            given = len(latents) if self.gives else 0
            state.conditioning = tuple(replace(branch, image=seen, given=given) for branch in state.conditioning)
        return [True] * len(items)

    def _encode(self, state: State) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What is given or lies beside, what an image encoder sees, and what the noise covers, if anything"""
        frames = state.request.sampling.num_frames
        assert frames is not None
        clip = to_pixels(state.request)[:, None]  # (3, 1, height, width)
        if not self.gives:
            clip = torch.cat((clip, clip.new_zeros(3, frames - 1, *clip.shape[2:])), dim=1)
        latents = self._latents(clip)
        if not self.gives:
            mask = latents.new_zeros(self.latents.frame_factor, *latents.shape[1:])
            mask[:, 0] = 1
            latents = torch.cat((mask, latents))
        return self.latents.pack(latents), None if self.see is None else self.see(state.request), None

    def _latents(self, clip: Tensor) -> Tensor:
        """(3, frames, height, width) in [-1, 1] -> (channels, frames, rows, columns) as the denoiser sees them"""
        parameter = next(self.vae.parameters())
        encoded = self.vae.encode(clip[None].to(parameter.device, parameter.dtype), return_dict=False)[0].mode()[0]
        return self.latents.from_vae(encoded.to("cpu", self.latents.dtype))


class EncodeStill(EncodeFirstFrame):
    """The same of a picture that is encoded by itself: what lies beside the later frames is empty, the mask is one channel behind
    the latents, and the noise of every frame covers a trace of the picture.

    Reference: diffusers `HunyuanVideoImageToVideoPipeline.prepare_latents`.
    """

    def __init__(self, vae: Any, latents: Latents, *, gives: bool):
        super().__init__(vae, latents, None, gives=gives)

    def _encode(self, state: State) -> tuple[Tensor, Tensor | None, Tensor | None]:
        first, frames = self._latents(to_pixels(state.request)[:, None]), self.latents.grid(state.request)[0]
        trace = self.latents.pack(first.expand(-1, frames, -1, -1))
        if self.gives:
            return self.latents.pack(first), None, trace
        masked = torch.cat((first, torch.ones_like(first[:1])))
        return self.latents.pack(F.pad(masked, (0, 0, 0, 0, 0, frames - 1))), None, trace


class ImageEncoder:
    """CLIP's last states but one of a picture: (tokens, channels)."""

    def __init__(self, processor: Any, model: Any):
        self.processor, self.model = processor, model

    def __call__(self, request: Request) -> Tensor:
        frames = request.image
        assert frames is not None
        picture = Image.frombytes("RGB", (frames.width, frames.height), frames.data)
        parameter = next(self.model.parameters())
        pixels = self.processor(images=picture, return_tensors="pt").pixel_values.to(parameter.device, parameter.dtype)
        states: Tensor = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][0]
        return states


class ChunkDecoder(Protocol):
    """A video VAE's decoder, taken chunk by chunk. Chunks lie in strips: within one, each hands a memory to the next (None at
    first); strips know nothing of each other until they are joined. Sizes are latent frames, rows and columns."""

    def strips(self, size: tuple[int, int, int]) -> tuple[int, int]:
        """How many there are, and how many chunks each has."""
        ...

    def decode(self, latents: Tensor, strip: int, chunk: int, memory: Any) -> tuple[Tensor, Any]:
        """All latents, (channels, frames, rows, columns), and which chunk is due -> its pixels, and the next memory. Changes
        neither argument."""
        ...

    def join(self, pixels: Tensor, size: tuple[int, int, int], strip: int, chunk: int, held: Any) -> tuple[Tensor | None, Any]:
        """A chunk's pixels after those of the strips before it -> the next (3, frames, height, width) in [-1, 1], None where it
        finishes none, and what is held of it and others (None at first). Changes no argument."""
        ...


class DecodeVideo(Stage):
    """A few frames per step, one video at a time: memory stays bounded, others are served between two steps, and an abort
    takes effect at the next. Several ranks decode a chunk of another strip each, and the first one joins them."""

    name = "decode"
    kinds = ("vae",)
    packs = False

    def __init__(self, decoder: ChunkDecoder, latents: Latents, ranks: Ranks = ALONE):
        self.decoder = decoder
        self.latents = latents
        self.ranks = ranks
        self.is_shared = ranks.size > 1

    def steps(self, request: Request) -> int:
        strips, chunks = self.decoder.strips(self._size(request))
        return math.ceil(strips / self.ranks.size) * chunks

    def tokens(self, request: Request) -> int:
        return DECODE_COST * self.latents.tokens(request) // self.steps(request)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        made = [self._decode(state, step) for state, step in items]
        for (state, _), (frames, decoding) in zip(items, made, strict=True):
            state.decoded, state.decoding = (*state.decoded, *frames), decoding
        done = [step + 1 >= self.steps(state.request) for state, step in items]
        for (state, _), is_done in zip(items, done, strict=True):
            if is_done:
                state.frames = _joined(state.decoded) if self.ranks.is_first else None
                state.decoded, state.decoding = (), None
        return done

    def _size(self, request: Request) -> tuple[int, int, int]:
        frames, rows, columns = (n * patch for n, patch in zip(self.latents.grid(request), self.latents.patch, strict=True))
        return frames, rows, columns

    def _decode(self, state: State, step: int) -> tuple[list[Frames], Any]:
        """The frames that a step finishes, and what the next one needs: a memory of this rank's strip, and what is held."""
        assert state.latents is not None
        latents, size = self.latents.unpack(state.latents, self.latents.grid(state.request)), self._size(state.request)
        strips, chunks = self.decoder.strips(size)
        first, chunk = step // chunks * self.ranks.size, step % chunks
        memory, held = state.decoding or (None, None)
        own, memory = self.ranks.together(
            lambda: (
                self.decoder.decode(latents, first + self.ranks.rank, chunk, memory if chunk else None)
                if first + self.ranks.rank < strips
                else (None, None)
            )
        )
        frames = []
        parts = self.ranks.collect(own)
        for strip, pixels in enumerate(parts if self.ranks.is_first else [], first):
            if pixels is not None:
                finished, held = self.decoder.join(pixels, size, strip, chunk, held)
                frames += [] if finished is None else [to_frames(finished)]
        return frames, (memory, held)


def _joined(parts: Sequence[Frames]) -> Frames:
    return Frames(b"".join(part.data for part in parts), sum(part.count for part in parts), parts[0].height, parts[0].width)


class WanDecoder:
    """AutoencoderKLWan, one latent frame at a time with its causal convolutions' caches: the bits of its own `decode`, which
    keeps every frame in memory. With tiling, a tile is a strip that goes through all frames before the next does, as caches are
    the larger part of memory; with the last one, frames are blended as `tiled_decode` does."""

    def __init__(self, vae: Any, latents: Latents):
        self.vae = vae
        self.latents = latents
        convolution = type(vae.post_quant_conv)
        self._convolutions = sum(isinstance(module, convolution) for module in vae.decoder.modules())
        self._patch = vae.config.patch_size

    def strips(self, size: tuple[int, int, int]) -> tuple[int, int]:
        rows, columns = self._tiles(*size[1:])
        return len(rows) * len(columns), size[0]

    def decode(self, latents: Tensor, strip: int, chunk: int, memory: Any) -> tuple[Tensor, Any]:
        parameter = next(self.vae.parameters())
        rows, columns = self._tiles(latents.shape[2], latents.shape[3])
        part = latents[None, :, chunk : chunk + 1]
        if len(rows) * len(columns) > 1:
            top, left = rows[strip // len(columns)], columns[strip % len(columns)]
            part = part[..., top : top + self._tile_latents("height"), left : left + self._tile_latents("width")]
        cache = list(memory) if chunk else [None] * self._convolutions  # a step that fails leaves the old one
        pixels: Tensor = self.vae.decoder(
            self.vae.post_quant_conv(self.latents.to_vae(part.to(parameter.device, parameter.dtype))),
            feat_cache=cache, feat_idx=[0], first_chunk=chunk == 0,
        )  # fmt: skip
        return pixels, cache

    def join(self, pixels: Tensor, size: tuple[int, int, int], strip: int, chunk: int, held: Any) -> tuple[Tensor | None, Any]:
        rows, columns = self._tiles(*size[1:])
        tiles: tuple[tuple[Tensor, ...], ...] = held or ((),) * size[0]  # of each frame
        mine = (*tiles[chunk], pixels)
        if len(mine) < len(rows) * len(columns):
            return None, (*tiles[:chunk], mine, *tiles[chunk + 1 :])
        if len(mine) > 1:
            copies = [*(tile.clone() for tile in mine[:-1]), pixels]  # blending changes all but the last
            pixels = self._blended([copies[i : i + len(columns)] for i in range(0, len(copies), len(columns))], size[1:])
        if self._patch is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            pixels = unpatchify(pixels, patch_size=self._patch)
        return pixels.clamp(-1.0, 1.0)[0], (*tiles[:chunk], (), *tiles[chunk + 1 :])

    def _tile_latents(self, side: str) -> int:
        return int(getattr(self.vae, f"tile_sample_min_{side}") // self.vae.spatial_compression_ratio)

    def _tiles(self, height: int, width: int) -> tuple[range, range]:
        """Where tiles begin, in latent rows and columns."""
        vae, ratio = self.vae, self.vae.spatial_compression_ratio
        if not vae.use_tiling or (height <= self._tile_latents("height") and width <= self._tile_latents("width")):
            return range(1), range(1)
        return range(0, height, vae.tile_sample_stride_height // ratio), range(0, width, vae.tile_sample_stride_width // ratio)

    def _blended(self, tiles: list[list[Tensor]], size: Sequence[int]) -> Tensor:
        vae, patch = self.vae, self._patch or 1
        stride = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
        overlap = vae.tile_sample_min_height // patch - stride[0], vae.tile_sample_min_width // patch - stride[1]
        rows = []
        for i, row in enumerate(tiles):
            cut = []
            for j, tile in enumerate(row):
                if i > 0:
                    tile = vae.blend_v(tiles[i - 1][j], tile, overlap[0])
                if j > 0:
                    tile = vae.blend_h(row[j - 1], tile, overlap[1])
                cut.append(tile[..., : stride[0], : stride[1]])
            rows.append(torch.cat(cut, dim=-1))
        height, width = (side * vae.spatial_compression_ratio // patch for side in size)
        return torch.cat(rows, dim=-2)[..., :height, :width]


class HunyuanDecoder:
    """AutoencoderKLHunyuanVideo; a strip is one of the overlapping tiles along time that it cuts longer videos into: the bits of
    its own `decode`, which keeps every frame in memory. With tiling, each of them is tiled in space too. The frames of latents
    that lead are dropped."""

    def __init__(self, vae: Any, latents: Latents):
        self.vae = vae
        self.latents = latents
        ratio = vae.temporal_compression_ratio
        self._length, self._stride = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
        self._overlap = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
        self._dropped = latents.lead * latents.frame_factor

    def strips(self, size: tuple[int, int, int]) -> tuple[int, int]:
        frames = size[0]
        return 1 if frames <= self._length else -(-(frames - 1) // self._stride), 1  # a last tile of one frame would add none

    def decode(self, latents: Tensor, strip: int, chunk: int, memory: Any) -> tuple[Tensor, Any]:
        vae, parameter, start = self.vae, next(self.vae.parameters()), strip * self._stride
        is_whole = latents.shape[1] <= self._length
        tile = latents[None] if is_whole else latents[None, :, start : start + self._length + 1]
        tile = self.latents.to_vae(tile.to(parameter.device, parameter.dtype))
        sides = zip(tile.shape[-2:], (vae.tile_sample_min_height, vae.tile_sample_min_width), strict=True)
        if vae.use_tiling and any(side > most // vae.spatial_compression_ratio for side, most in sides):
            pixels: Tensor = vae.tiled_decode(tile, return_dict=False)[0]
        else:
            pixels = vae.decoder(vae.post_quant_conv(tile))
        return pixels if is_whole or strip == 0 else pixels[:, :, 1:], None

    def join(self, pixels: Tensor, size: tuple[int, int, int], strip: int, chunk: int, held: Any) -> tuple[Tensor, Any]:
        vae, dropped = self.vae, self._dropped if strip == 0 else 0
        if size[0] <= self._length:
            return pixels[0, :, dropped:], None
        if strip > 0:
            pixels = vae.blend_t(held, pixels.clone(), self._overlap)  # changes the second only
        kept = vae.tile_sample_stride_num_frames + (strip == 0)
        return pixels[0, :, dropped:kept], pixels[:, :, max(0, pixels.shape[2] - self._overlap) :].clone()

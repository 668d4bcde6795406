"""Pictures into video latents, and video latents into frames, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

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
    """A video VAE's decoder, taken chunk by chunk; what one hands to the next goes through `memory`, None at first."""

    def chunks(self, size: tuple[int, int, int]) -> int:
        """How many there are of so many latent frames, rows and columns."""
        ...

    def decode(self, latents: Tensor, chunk: int, memory: Any) -> tuple[Tensor | None, Any]:
        """All latents, (channels, frames, rows, columns), and which chunk is due -> the next pixels (3, frames, height, width) in
        [-1, 1], None where a chunk finishes none, and the next memory. Changes neither argument."""
        ...


class DecodeVideo(Stage):
    """A few frames per step, one video at a time: memory stays bounded, others are served between two steps, and an abort
    takes effect at the next."""

    name = "decode"
    is_shared = False
    kinds = ("vae",)
    packs = False

    def __init__(self, decoder: ChunkDecoder, latents: Latents):
        self.decoder = decoder
        self.latents = latents

    def steps(self, request: Request) -> int:
        frames, rows, columns = (n * patch for n, patch in zip(self.latents.grid(request), self.latents.patch, strict=True))
        return self.decoder.chunks((frames, rows, columns))

    def tokens(self, request: Request) -> int:
        return DECODE_COST * self.latents.tokens(request) // self.steps(request)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        made = [self._decode(state, step) for state, step in items]
        for (state, _), (frames, memory) in zip(items, made, strict=True):
            state.decoded, state.decoding = (*state.decoded, *frames), memory
        done = [step + 1 >= self.steps(state.request) for state, step in items]
        for (state, _), is_done in zip(items, done, strict=True):
            if is_done:
                state.frames, state.decoded, state.decoding = _joined(state.decoded), (), None
        return done

    def _decode(self, state: State, step: int) -> tuple[tuple[Frames, ...], Any]:
        assert state.latents is not None
        latents = self.latents.unpack(state.latents, self.latents.grid(state.request))
        pixels, memory = self.decoder.decode(latents, step, state.decoding)
        return () if pixels is None else (to_frames(pixels),), memory


def _joined(parts: Sequence[Frames]) -> Frames:
    return Frames(b"".join(part.data for part in parts), sum(part.count for part in parts), parts[0].height, parts[0].width)


class WanDecoder:
    """AutoencoderKLWan, one latent frame at a time with its causal convolutions' caches: the bits of its own `decode`, which
    keeps every frame in memory. With tiling, one tile after the other goes through all frames, as caches are the larger part
    of memory; with the last one, frames are blended as `tiled_decode` does."""

    def __init__(self, vae: Any, latents: Latents):
        self.vae = vae
        self.latents = latents
        convolution = type(vae.post_quant_conv)
        self._convolutions = sum(isinstance(module, convolution) for module in vae.decoder.modules())
        self._patch = vae.config.patch_size

    def chunks(self, size: tuple[int, int, int]) -> int:
        rows, columns = self._tiles(*size[1:])
        return size[0] * len(rows) * len(columns)

    def decode(self, latents: Tensor, chunk: int, memory: Any) -> tuple[Tensor | None, Any]:
        parameter = next(self.vae.parameters())
        frames, size = latents.shape[1], latents.shape[2:]
        rows, columns = self._tiles(*size)
        tile, frame = divmod(chunk, frames)
        part = latents[None, :, frame : frame + 1]
        if len(rows) * len(columns) > 1:
            top, left = rows[tile // len(columns)], columns[tile % len(columns)]
            part = part[..., top : top + self._tile_latents("height"), left : left + self._tile_latents("width")]
        cache, made = memory or ([], ())
        cache = list(cache) if frame else [None] * self._convolutions  # a step that fails leaves the old one
        pixels = self._decoded(self.latents.to_vae(part.to(parameter.device, parameter.dtype)), cache, frame)
        if tile + 1 < len(rows) * len(columns):
            return None, (cache, (*made, pixels))
        if tile > 0:
            tiles = [*(other.clone() for other in made[frame::frames]), pixels]  # blending changes them
            pixels = self._blended([tiles[i : i + len(columns)] for i in range(0, len(tiles), len(columns))], size)
            made = tuple(None if i % frames == frame else other for i, other in enumerate(made))
        if self._patch is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            pixels = unpatchify(pixels, patch_size=self._patch)
        return pixels.clamp(-1.0, 1.0)[0], (cache, made)

    def _decoded(self, latents: Tensor, cache: list[Any], frame: int) -> Tensor:
        decoded: Tensor = self.vae.decoder(
            self.vae.post_quant_conv(latents), feat_cache=cache, feat_idx=[0], first_chunk=frame == 0
        )
        return decoded

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
    """AutoencoderKLHunyuanVideo, one of the overlapping tiles along time that it cuts longer videos into per chunk: the bits of
    its own `decode`, which keeps every frame in memory. With tiling, each of them is tiled in space too. The frames of latents
    that lead are dropped."""

    def __init__(self, vae: Any, latents: Latents):
        self.vae = vae
        self.latents = latents
        ratio = vae.temporal_compression_ratio
        self._length, self._stride = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
        self._overlap = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
        self._dropped = latents.lead * latents.frame_factor

    def chunks(self, size: tuple[int, int, int]) -> int:
        frames = size[0]
        return 1 if frames <= self._length else -(-(frames - 1) // self._stride)  # a last tile of one frame would add none

    def decode(self, latents: Tensor, chunk: int, memory: Any) -> tuple[Tensor, Any]:
        vae, parameter, start = self.vae, next(self.vae.parameters()), chunk * self._stride
        is_whole = latents.shape[1] <= self._length
        tile = latents[None] if is_whole else latents[None, :, start : start + self._length + 1]
        tile = self.latents.to_vae(tile.to(parameter.device, parameter.dtype))
        sides = zip(tile.shape[-2:], (vae.tile_sample_min_height, vae.tile_sample_min_width), strict=True)
        if vae.use_tiling and any(side > most // vae.spatial_compression_ratio for side, most in sides):
            pixels = vae.tiled_decode(tile, return_dict=False)[0]
        else:
            pixels = vae.decoder(vae.post_quant_conv(tile))
        if is_whole:
            return pixels[0, :, self._dropped :], None
        if chunk > 0:
            pixels = vae.blend_t(memory, pixels[:, :, 1:], self._overlap)  # changes the second only
        kept = vae.tile_sample_stride_num_frames + (chunk == 0)
        dropped = self._dropped if chunk == 0 else 0
        return pixels[0, :, dropped:kept], pixels[:, :, max(0, pixels.shape[2] - self._overlap) :].clone()

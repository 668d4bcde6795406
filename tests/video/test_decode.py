"""Decoding a video chunk by chunk gives the bits of the autoencoder's own decode, in bounded memory and with aborts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan

from stepwell.config.schema import EngineOptions
from stepwell.engine.local import LocalEngine
from stepwell.generator import open_engine
from stepwell.models import wan
from stepwell.models.parts import set_tile_size
from stepwell.stages.latents import Latents
from stepwell.stages.video import ChunkDecoder, HunyuanDecoder, WanDecoder
from stepwell.types import Done, Event, Failed, Progress, Request, SamplingParams
from tests.support.repositories import randomise, wan_repository

COARSE: dict[str, Any] = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                          "scale_factor_spatial": 16, "decoder_base_dim": 8}  # fmt: skip


@pytest.mark.parametrize("tile", [None, (32, 48)], ids=["whole", "tiled"])
@pytest.mark.parametrize("changes", [{}, COARSE], ids=["plain", "patches"])
@torch.no_grad()
def test_chunks_are_the_bits_of_the_whole(changes: dict[str, Any], tile: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, latents_mean=[0.0] * 4,
                           latents_std=[1.0] * 4, **changes).eval()  # fmt: skip
    randomise(vae)
    tiled(vae, tile)
    assert counts_of_equal_chunks(vae, WanDecoder(vae, Latents(4, 8, 1.0, 0.0, frame_factor=4)), 3) == [1, 4, 4]


@pytest.mark.parametrize("tile", [None, (32, 48)], ids=["whole", "tiled"])
@pytest.mark.parametrize(
    ("frames", "counts"), [(1, [1]), (4, [13]), (5, [13, 4]), (7, [13, 12]), (8, [13, 12, 4]), (9, [13, 12, 8])]
)
@torch.no_grad()
def test_tiles_along_time_are_the_bits_of_the_whole(frames: int, counts: list[int], tile: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2,
                                    scaling_factor=1.0).eval()  # fmt: skip
    randomise(vae)
    tiled(vae, tile)
    assert counts_of_equal_chunks(vae, HunyuanDecoder(vae, Latents(4, 8, 1.0, 0.0, frame_factor=4)), frames) == counts


def tiled(vae: Any, tile: tuple[int, int] | None) -> None:
    if tile is not None:
        options = EngineOptions(vae_config={"tile_sample_min_height": tile[0], "tile_sample_min_width": tile[1]})  # type: ignore[arg-type]
        vae.enable_tiling()
        set_tile_size(vae, options.vae_config)


def counts_of_equal_chunks(vae: Any, decoder: ChunkDecoder, frames: int) -> list[int]:
    """How many frames each chunk has; that they are those of the autoencoder's own decode, also if repeated, is asserted."""
    clip = torch.randn(4, frames, 5, 7)
    whole = vae.decode(clip[None], return_dict=False)[0][0]
    size = (frames, 5, 7)
    strips, chunks = decoder.strips(size)
    counts = []
    for ranks in (1, 2, 3):  # so many strips at a time, each by its own
        held, parts = None, []
        for first in range(0, strips, ranks):
            at_once = range(first, min(first + ranks, strips))
            memories: dict[int, Any] = dict.fromkeys(at_once)
            for chunk in range(chunks):
                made = {}
                for strip in at_once:
                    before = memories[strip]
                    made[strip], memories[strip] = decoder.decode(clip, strip, chunk, before)
                    again, _ = decoder.decode(clip, strip, chunk, before)  # a step that is repeated starts from what was
                    assert torch.equal(made[strip], again)
                for strip, pixels in made.items():
                    was, copy = held, pixels.clone()
                    finished, held = decoder.join(pixels, size, strip, chunk, was)
                    again_finished, _ = decoder.join(copy, size, strip, chunk, was)
                    assert (finished is None) == (again_finished is None) and torch.equal(pixels, copy)
                    if finished is not None and again_finished is not None:
                        assert torch.equal(finished, again_finished)
                        parts.append(finished)
        assert torch.equal(torch.cat(parts, dim=1), whole)
        counts.append([part.shape[1] for part in parts])
    assert counts[0] == counts[1] == counts[2]
    return counts[0]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = wan_repository(tmp_path_factory.mktemp("wan"), dict(wan.T2V_1B.tiny))
    made = open_engine(EngineOptions(model_path=str(path), threads=1))
    made.open()
    yield made
    made.shut()


def test_an_abort_takes_effect_between_two_chunks(engine: LocalEngine) -> None:
    asked = Request("a red circle", SamplingParams(num_frames=17, num_inference_steps=1, seed=1))
    chunks: list[int] = []
    over = threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "decode":
            chunks.append(event.step)
            if event.step == 2:
                engine.cancel(asked.id)
        if isinstance(event, Done | Failed):
            over.set()

    engine.submit(asked, sink)
    assert over.wait(60) and chunks == [1, 2]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_frames": 6}, "num_frames = 6: must be a multiple of 4 and one more; 5 or 9 would do"),
        ({"num_frames": 0}, "num_frames = 0: must be between 1 and"),
        ({"width": 40}, "width = 40: must be a multiple of 16; 32 or 48 would do"),
    ],
)
def test_impossible_counts_are_refused(engine: LocalEngine, asked: dict[str, int], said: str) -> None:
    with pytest.raises(Exception, match=said.replace("+", r"\+")):
        engine.submit(Request("a red circle", SamplingParams(seed=1, **asked)), lambda event: None)  # type: ignore[arg-type]


def test_one_frame_is_a_picture(engine: LocalEngine) -> None:
    *_, last = engine.stream(Request("a red circle", SamplingParams(num_frames=1, num_inference_steps=1, seed=1)))
    assert isinstance(last, Done) and last.outputs[0].frames.count == 1

"""The short ways training takes must give what the shipped layout gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from training.clip_latents import per_token
from training.moving import FRAMES, sample_motion, silhouette
from training.train_video_vae import build, decode, encode
from training.train_wan import TextAttention, build_transformer, padding_bias


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_whole_clips_are_coded_as_chunks_are(frames: int) -> None:
    torch.manual_seed(0)
    vae = build().eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        clip = torch.rand(1, 3, frames, 16, 24) * 2 - 1
        latents = vae.encode(clip).latent_dist.mean
        torch.testing.assert_close(encode(vae, clip), latents, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(decode(vae, latents).clamp(-1, 1), vae.decode(latents).sample, atol=1e-5, rtol=1e-4)


def test_one_zero_token_stands_for_all_padding() -> None:
    torch.manual_seed(0)
    model, trained = build_transformer(4).eval(), build_transformer(4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trained.load_state_dict(model.state_dict())
    attention = TextAttention()
    for block in trained.blocks:
        block.attn2.set_processor(attention)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    text = torch.randn(2, 6, 64) * mask[..., None]
    padded = torch.zeros(2, 100, 64)
    padded[:, :6] = text
    latents, timestep = torch.randn(2, 4, 2, 4, 4), torch.tensor([300.0, 800.0])
    attention.bias = padding_bias(mask, 100)
    with torch.no_grad():
        wanted = model(latents, timestep, padded).sample
        got = trained(latents, timestep, torch.cat([text, torch.zeros(2, 1, 64)], 1)).sample
        attention.bias = padding_bias(mask, 7)
        other = trained(latents, timestep, torch.cat([text, torch.zeros(2, 1, 64)], 1)).sample
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (other - wanted).abs().max() > 1e-3


def test_silhouettes_lie_where_the_tokens_are() -> None:
    mask = silhouette(sample_motion(random.Random(3)), FRAMES, 32, 32)
    cells = per_token(torch.from_numpy(mask[None])).view(5, 8, 8, 4, 4, 4).numpy()  # latent frame, row, column, frame, y, x
    assert np.array_equal(cells[2, 3, 4, 1], mask[6, 12:16, 16:20])
    assert np.array_equal(cells[0, 3, 4, 2], mask[0, 12:16, 16:20])
    assert cells[1:].sum() == mask[1:].sum(dtype=np.int64)

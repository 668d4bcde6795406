"""What tells a model in training how the outlines of its estimate are wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def outlines(silhouettes: Tensor, side: int) -> Tensor:
    """Where a silhouette's edge runs, cell by cell: (pictures, tokens, cells) in 0 … 1 -> the same. A token's cells are a grid of
    `side` × `side` for each frame it covers."""
    grids = silhouettes.unflatten(-1, (-1, side, side)).flatten(0, 1)  # inside a token: its neighbours tell colours, not it
    return (F.max_pool2d(grids, 3, 1, 1) + F.max_pool2d(-grids, 3, 1, 1)).reshape(silhouettes.shape)


class OutlineProbe(nn.Module):
    """Reads outlines off clean latents, token by token. Trained first and then frozen, it tells the transformer how the
    outlines of its estimate are wrong: the flow's loss alone hardly sees an edge that waves."""

    def __init__(self, channels: int, cells: int, side: int):
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(nn.Linear(channels, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, cells))

    def loss(self, latents: Tensor, silhouettes: Tensor) -> Tensor:
        """(pictures, tokens, channels), (pictures, tokens, cells) in 0 … 1 -> binary cross-entropy"""
        return F.binary_cross_entropy_with_logits(self.layers(latents), outlines(silhouettes, self.side))

    def fit(self, latents: Tensor, silhouettes: Tensor, steps: int = 3000) -> None:
        """latents: (pictures, tokens, channels); silhouettes: (pictures, tokens, cells) in 0 … 255"""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            picked = torch.randint(len(latents), (24,))
            clean = latents[picked].float()
            loss = self.loss(clean + 0.1 * torch.randn_like(clean), silhouettes[picked].float() / 255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"outlines are read from latents at a loss of {loss.item():.4f}", flush=True)
        self.requires_grad_(False)

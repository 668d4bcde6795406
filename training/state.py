"""A trainer on disk: what it needs to go on, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from training.optimizer import Optimizers


class Trainer(Protocol):
    """`average` is the model's exponential average, which ships; `head` exists in training only."""

    model: nn.Module
    average: nn.Module
    head: nn.Module
    optimizers: Optimizers
    step: int


PARTS = ("model", "head", "average", "optimizers")


def save(trainer: Trainer, folder: Path) -> None:
    """As `<folder>/state.pt`."""
    state = {name: getattr(trainer, name).state_dict() for name in PARTS}
    partial = folder / "state.pt.partial"
    torch.save({"step": trainer.step, **state}, partial)
    partial.rename(folder / "state.pt")


def restore(trainer: Trainer, folder: Path) -> None:
    """From `<folder>/state.pt`."""
    state = torch.load(folder / "state.pt", weights_only=False)
    trainer.step = state["step"]
    for name in PARTS:
        getattr(trainer, name).load_state_dict(state[name])

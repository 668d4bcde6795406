"""Offload by part: a text encoder, a VAE or a transformer is on the device only while a stage that needs it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stepwell.offload.homes import at_home


class Movable(Protocol):
    """Weights that come to the device and go home again; both may be said twice."""

    def come(self) -> None: ...

    def rest(self) -> None: ...


class Resident:
    """The tensors of one part. Their home is the machine's memory, pinned if asked for; on `device` they are copies,
    so that going home costs nothing."""

    def __init__(self, tensors: Iterable[Tensor], device: str, *, pin: bool):
        self._device, self._pin = device, pin
        self._tensors = list(tensors)
        self._homes = [at_home(tensor.data, pin=pin) for tensor in self._tensors]
        self._is_here = True
        self.rest()

    def come(self) -> None:
        if self._is_here:
            return
        self._is_here = True
        try:
            for tensor, home in zip(self._tensors, self._homes, strict=True):
                tensor.data = torch.empty_like(home, device=self._device, pin_memory=False).copy_(home, non_blocking=self._pin)
        except BaseException:  # no room: the step fails, and what came has to make room again
            self.rest()
            raise

    def rest(self) -> None:
        if not self._is_here:
            return
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home
        self._is_here = False


class Residency:
    """Whose turn it is on the device. `movables` are the offloaded parts by kind; kinds that are not in it stay."""

    def __init__(self, movables: Mapping[str, Sequence[Movable]] | None = None):
        self._movables = dict(movables or {})

    def bring(self, kinds: Sequence[str]) -> None:
        """Have the parts of these kinds here, and no others: they go first, to make room."""
        for kind, movables in self._movables.items():
            if kind not in kinds:
                for movable in movables:
                    movable.rest()
        for kind in kinds:
            for movable in self._movables.get(kind, ()):
                movable.come()

    def rest(self) -> None:
        """Nobody's turn."""
        self.bring(())

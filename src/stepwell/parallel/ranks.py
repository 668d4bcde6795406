"""Ranks: processes that run one model together, every one of them the same steps at the same time.

The sequences of a packed step (guidance branches of samples) are spread over them, or over teams of them; each computes its own
with all of the model, then they exchange predictions, which are small. As a sequence's bits do not depend on its neighbours,
they do not depend on the number of ranks either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from msgspec import msgpack
from torch import Tensor

from stepwell.errors import StepFailed, StepwellError
from stepwell.ops.packing import Lane
from stepwell.parallel import team
from stepwell.parallel.group import Group, Lost
from stepwell.parallel.team import Team

T = TypeVar("T")


class Agreed(Exception):
    """An error of one rank that all of them know of and raise."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those that run a model, and how it talks to them. `splits_guidance`: whether the branches of
    one sample are spread too. Every method but `team_of` is called by all ranks at the same time, and raises Lost."""

    rank: int = 0
    size: int = 1
    splits_guidance: bool = False
    group: Group | None = None  # None where there is one rank
    team: Team = team.ALONE

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def own_team(self) -> int:
        """The number of the team this one is of: its ranks follow one another."""
        return self.rank // self.team.size

    def team_of(self, seed: int, branch: int, branches: int) -> int:
        """Which team computes a guidance branch of the sample of this seed: outputs of one request have consecutive ones."""
        return (seed * branches + branch if self.splits_guidance else seed) % (self.size // self.team.size)

    def is_mine(self, lane: Lane) -> bool:
        """Whether this rank computes any of a lane."""
        return lane.team == self.own_team and self.team.has(lane)

    def first(self, data: bytes) -> bytes:
        """What rank 0 gives, on every rank; others may give anything."""
        return self.every(data if self.is_first else b"")[0]

    def every(self, data: bytes) -> list[bytes]:
        """What each rank gives, on every rank."""
        return [data] if self.group is None else [part.numpy().tobytes() for part in self._gather(_bytes(data))]

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once every rank is done with its own. If one fails, all raise Agreed with its error: its own
        where it failed, else one that says what became of the other."""
        if self.group is None:
            return work()
        try:
            made = work()
        except (Agreed, Lost):
            raise
        except Exception as error:
            self.every(_told(error))
            raise Agreed(error) from error
        for rank, told in enumerate(self.every(b"")):
            if told:
                raise Agreed(StepFailed(f"rank {rank} of {self.size}: {told.decode()}"))
        return made

    def exchange(self, own: Tensor, lanes: Sequence[Lane]) -> list[Tensor]:
        """Rows of every lane, from those of one's own in their order: (rows, channels) -> (tokens, channels) each."""
        if self.group is None:
            return list(own.split([lane.tokens for lane in lanes]))
        parts = [
            part.view(own.dtype).view(-1, own.shape[1]).to(own.device)
            for part in self._gather(own.detach().cpu().contiguous().view(torch.uint8).flatten())
        ]
        taken = [0] * self.size
        made = []
        for lane in lanes:
            rows = []
            for member, count in enumerate((lane.tokens,) if lane.cut is None else lane.cut.tokens):
                rank = lane.team * self.team.size + member
                rows.append(parts[rank][taken[rank] : taken[rank] + count])
                taken[rank] += count
            made.append(rows[0] if len(rows) == 1 else torch.cat(rows))
        return made

    def collect(self, own: Tensor | None) -> list[Tensor | None]:
        """What each rank has, of any shape and one dtype, None where it has nothing; on this rank's device, if it has any."""
        if self.group is None:
            return [own]
        example = torch.empty(0) if own is None else own
        shape = None if own is None else tuple(own.shape)
        shapes = [msgpack.decode(said, type=tuple[int, ...] | None) for said in self.every(msgpack.encode(shape))]
        parts = self._gather(example.detach().cpu().contiguous().view(torch.uint8).flatten())
        return [
            None if shape is None else part.view(example.dtype).view(shape).to(example.device)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def _gather(self, data: Tensor) -> list[Tensor]:
        """(bytes,) uint8, as long as each rank likes -> that of every rank"""
        assert self.group is not None
        try:
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            self.group.allgather([lengths], [torch.tensor([len(data)])]).wait()
            parts = []
            for rank, length in enumerate(map(int, lengths)):
                part = data if rank == self.rank else torch.empty(length, dtype=torch.uint8)
                if length:
                    self.group.broadcast(part, rank).wait()
                parts.append(part)
            return parts
        except RuntimeError as error:
            raise Lost.because(error) from error


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _told(error: Exception) -> bytes:
    text = error.message if isinstance(error, StepwellError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:400]}".encode()


ALONE = Ranks()

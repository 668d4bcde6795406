"""A team: the ranks that hold a sequence together, a part of its rows each, or a model, a part of its weights each.

`ulysses` × `ring` of them. Those in one row of the ring swap rows for heads (S. Jacobs et al. 2023, "DeepSpeed Ulysses"); keys
and values then travel from row to row (H. Liu et al. 2023, "Ring Attention"). What a rank fails at, all of its team learn the
next time they would talk, so that none waits for who will not come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stepwell.errors import StepFailed, StepwellError
from stepwell.ops.packing import Cut, Lane
from stepwell.parallel.group import Group, Lost, Work

T = TypeVar("T")
REASON_BYTES = 400


class _Elsewhere(Exception):
    """Another one of the team has failed."""


@dataclass(frozen=True, slots=True)
class Team:
    """This rank's place in its team: of `ulysses` × `ring` ranks that cut sequences, or of `tensor` that split weights. Every
    method but `cut` and `row` is called by all of a team at the same time, and raises Lost."""

    ulysses: int = 1
    ring: int = 1
    member: int = 0
    group: Group | None = None  # None where it is one rank
    tensor: int = 1

    @property
    def size(self) -> int:
        return self.ulysses * self.ring * self.tensor

    @property
    def row(self) -> range:
        """Those that swap heads with this one."""
        first = self.member - self.member % self.ulysses
        return range(first, first + self.ulysses)

    def cut(self, prefix: int, tokens: int) -> Cut | None:
        """How a sequence is cut; None where it is too short, and the first one computes it whole."""
        if self.size == 1 or tokens < self.size or 0 < prefix < self.size:
            return None
        return Cut(_even(prefix, self.size), _even(tokens, self.size), self.member)

    def has(self, lane: Lane) -> bool:
        """Whether this one computes any of a lane of the team's."""
        return lane.cut is not None or self.member == 0

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once all are done with theirs. Raises StepFailed where another one has failed."""
        if self.group is None:
            return work()
        try:
            made = work()
            self.meet()
        except _Elsewhere as error:
            raise StepFailed(str(error)) from error
        except Lost:
            raise
        except Exception as error:
            self._tell(error)
            raise
        return made

    def swap(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """Give each of one's row its part, (any, ...) of the same other sizes, and get one of `rows` rows of each."""
        return self._send(dict(zip(self.row, parts, strict=True)), dict(zip(self.row, rows, strict=True)))

    def pass_on(self, rows: Tensor, coming: int) -> Tensor:
        """Give something to one's place in the next row, and get that of the one before, of `coming` rows."""
        after, before = ((self.member + way * self.ulysses) % self.size for way in (1, -1))
        return self._send({after: rows}, {before: coming})[0]

    def mean(self, values: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """(lanes, ...) of each one's own tokens, of lanes -> of all their tokens. Lanes that are not cut keep their values."""
        cuts = {place: lane.cut for place, lane in enumerate(lanes) if lane.cut is not None}
        if not cuts:
            return values
        self.meet()
        own = values.detach().float().cpu()
        given = own[list(cuts)]  # lanes that are not cut are known to one rank only
        parts = [torch.empty_like(given) for _ in range(self.size)]
        self._talk(lambda group: group.allgather([parts], [given]))
        for place, cut, *of_members in zip(cuts, cuts.values(), *parts, strict=True):
            weights = torch.tensor(cut.tokens, dtype=torch.float32) / sum(cut.tokens)
            own[place] = torch.tensordot(weights, torch.stack(of_members), 1)
        return own.to(values)

    def sum(self, part: Tensor) -> Tensor:
        """What all give, of one shape, added in their order and rounded once: the same bits for all."""
        self.meet()
        own = part.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._talk(lambda group: group.allgather([parts], [own]))
        total = parts[0].float()
        for other in parts[1:]:
            total = total + other
        return total.to(part)

    def meet(self) -> None:
        """Wait for all."""
        self._tell(None)

    def _tell(self, error: Exception | None) -> None:
        """Say what has failed here, if anything has, and learn what has elsewhere, which is raised unless it failed here too."""
        text = "" if error is None else error.message if isinstance(error, StepwellError) else f"{type(error).__name__}: {error}"
        data = " ".join(text.split()).encode()[:REASON_BYTES]
        own = torch.zeros(1 + REASON_BYTES, dtype=torch.uint8)
        if error is not None:
            own[0] = 1
            own[1 : 1 + len(data)] = torch.frombuffer(bytearray(data or b"?"), dtype=torch.uint8)
        said = [torch.empty_like(own) for _ in range(self.size)]
        self._talk(lambda group: group.allgather([said], [own]))
        for member, words in enumerate(said):
            if words[0] and error is None:
                reason = bytes(words[1:].tolist()).rstrip(b"\0").decode(errors="replace")
                raise _Elsewhere(f"part {member} of {self.size}: {reason}")

    def _send(self, parts: dict[int, Tensor], rows: dict[int, int]) -> list[Tensor]:
        """By member: what each is given, and how many rows each gives."""
        self.meet()
        example = next(iter(parts.values()))
        sizes, members = example.shape[1:], range(self.size)
        going = [_bytes(parts[member]) if member in parts else torch.empty(0, dtype=torch.uint8) for member in members]
        coming = [rows.get(member, 0) * sizes.numel() * example.element_size() for member in members]
        output = torch.empty(sum(coming), dtype=torch.uint8)
        self._talk(lambda group: group.alltoall_base(output, torch.cat(going), coming, [len(part) for part in going]))
        return [
            part.view(example.dtype).view(-1, *sizes).to(example.device)
            for member, part in zip(members, output.split(coming), strict=True)
            if member in rows
        ]

    def _talk(self, say: Callable[[Group], Work]) -> None:
        assert self.group is not None
        try:
            say(self.group).wait()
        except RuntimeError as error:
            raise Lost.because(error) from error


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu()


def _even(count: int, parts: int) -> tuple[int, ...]:
    """As evenly as can be: 7 in 3 -> 3, 2, 2"""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


ALONE = Team()

"""The layout of a packed batch: many sequences of different lengths, one after the other, in one long matrix.

Linears and row norms see `(tokens, channels)` and need no layout. What depends on the sequence (modulation, gates,
attention) works on *groups*: runs of neighbouring sequences of equal length, each viewed as a batch without a copy.
A single sample is one group of one, and costs what it would cost without packing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """How a sequence is cut over processes: how many tokens of its prefix and of its grid each has, and which part is here."""

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]
    part: int

    @property
    def rows(self) -> tuple[slice, slice]:
        """Of the whole prefix and of the whole grid: those that are here."""
        return _slice(self.prefix, self.part), _slice(self.tokens, self.part)


@dataclass(slots=True, eq=False)
class Lane:
    """One sequence of packed batches, through all steps of its request: a guidance branch of a sample.

    `prepared` is the model's own. `prefix` tokens (text) come before those of the `grid` (frames, rows, columns). `step` is
    the one being taken, of `steps`. `cache` is what the step cache remembers of this sequence, None where there is none. `team`
    computes it, of those that run the model; where it is `cut`, `prepared`, `prefix` and `tokens` are of the part that is here.
    """

    prepared: Any
    steps: int
    prefix: int
    grid: tuple[int, int, int]
    step: int = 0
    cache: Any = None
    team: int = 0
    cut: Cut | None = None

    @property
    def shape(self) -> tuple[int, tuple[int, int, int]]:
        """Prefix and grid of the whole sequence, wherever its parts are."""
        return (self.prefix if self.cut is None else sum(self.cut.prefix)), self.grid

    @property
    def tokens(self) -> int:
        """Without the prefix."""
        return math.prod(self.grid) if self.cut is None else self.cut.tokens[self.cut.part]


@dataclass(frozen=True, slots=True)
class Group:
    """`count` sequences of `length` tokens: rows `start:stop` of the packed matrix, sequences `first:last`."""

    first: int
    count: int
    start: int
    length: int

    @property
    def last(self) -> int:
        return self.first + self.count

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length

    def rows(self, packed: Tensor) -> Tensor:
        """(tokens, ...) -> a view of this group, (count, length, ...)"""
        if self.count * self.length != len(packed):
            packed = packed[self.start : self.stop]
        return packed.view(self.count, self.length, *packed.shape[1:])


class Segments:
    """Where each sequence lies in a packed matrix, and whose it is; `lanes` may be left out where nobody asks."""

    def __init__(self, lengths: Sequence[int], lanes: Sequence[Lane] = ()):
        self.lengths = tuple(lengths)
        self.lanes = tuple(lanes)
        groups: list[Group] = []
        start = 0
        for index, length in enumerate(self.lengths):
            if groups and groups[-1].length == length:
                last = groups[-1]
                groups[-1] = Group(last.first, last.count + 1, last.start, length)
            else:
                groups.append(Group(index, 1, start, length))
            start += length
        self.groups = tuple(groups)
        self.total = start
        self._owners: Tensor | None = None
        self._offsets: Tensor | None = None

    def offsets(self, device: torch.device) -> Tensor:
        """Where each sequence begins, and the total: (sequences + 1,) int32. Copied to the device once per layout."""
        if self._offsets is None or self._offsets.device != device:
            starts = list(itertools.accumulate(self.lengths, initial=0))
            self._offsets = torch.tensor(starts, dtype=torch.int32, device=device)
        return self._offsets

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """(tokens, ...) -> one view per sequence, (length, ...)"""
        return packed.split(self.lengths)

    def owners(self, device: torch.device) -> Tensor:
        """(tokens,) int64: which sequence each row belongs to. Made once."""
        if self._owners is None or self._owners.device != device:
            self._owners = _runs(self.lengths).to(device)
        return self._owners


class JointLayout:
    """Two streams, text and image, each packed by itself, and the joint sequences [text; image] of every sample."""

    def __init__(self, lanes: Sequence[Lane]):
        text_lengths, image_lengths = [lane.prefix for lane in lanes], [lane.tokens for lane in lanes]
        self.text, self.image = Segments(text_lengths, lanes), Segments(image_lengths, lanes)
        self.joint = Segments([t + i for t, i in zip(text_lengths, image_lengths, strict=True)], lanes)
        # groups of samples that agree in both lengths; the streams' own groups may be larger
        self._groups: list[tuple[Group, Group, Group]] = []
        starts = [0, 0, 0]
        index = 0
        pairs = list(zip(text_lengths, image_lengths, strict=True))
        while index < len(pairs):
            count = 1
            while index + count < len(pairs) and pairs[index + count] == pairs[index]:
                count += 1
            t, i = pairs[index]
            group = tuple(Group(index, count, s, n) for s, n in zip(starts, (t, i, t + i), strict=True))
            self._groups.append((group[0], group[1], group[2]))
            starts = [g.stop for g in group]
            index += count
        self._kinds: Tensor | None = None

    def kinds(self, device: torch.device) -> Tensor:
        """(joint tokens,) int64: 0 for a row of text, 1 for one of the image. Made once."""
        if self._kinds is None or self._kinds.device != device:
            pairs = zip(self.text.lengths, self.image.lengths, strict=True)
            self._kinds = _runs([length for pair in pairs for length in pair]).remainder_(2).to(device)
        return self._kinds

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """(text tokens, ...) and (image tokens, ...) -> (joint tokens, ...)"""
        if len(self.joint.lengths) == 1:
            return torch.cat((text, image))
        parts = [torch.cat((t.rows(text), i.rows(image)), dim=1).flatten(0, 1) for t, i, _ in self._groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def text_of(self, joint: Tensor) -> Tensor:
        """(joint tokens, ...) -> (text tokens, ...)"""
        if len(self.joint.lengths) == 1:
            return joint[: self.text.total]
        parts = [part.flatten(0, 1) for part in self.text_views(joint)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def image_of(self, joint: Tensor) -> Tensor:
        """(joint tokens, ...) -> (image tokens, ...)"""
        if len(self.joint.lengths) == 1:
            return joint[self.text.total :]
        parts = [part.flatten(0, 1) for part in self.image_views(joint)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def text_views(self, joint: Tensor) -> list[Tensor]:
        """Views of the text tokens, one (count, text length, ...) per group."""
        return [j.rows(joint)[:, : t.length] for t, _, j in self._groups]

    def image_views(self, joint: Tensor) -> list[Tensor]:
        """Views of the image tokens, one (count, image length, ...) per group."""
        return [j.rows(joint)[:, t.length :] for t, _, j in self._groups]


def _slice(lengths: Sequence[int], place: int) -> slice:
    """[2, 1, 3], 2 -> 3:6"""
    start = sum(lengths[:place])
    return slice(start, start + lengths[place])


def _runs(lengths: Sequence[int]) -> Tensor:
    """[2, 1, 3] -> 0 0 1 2 2 2"""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

"""Attention of sequences that are cut over a team.

Every rank brings its rows of all heads. Those of a row of the ring swap rows for heads, so that each has all that the row has, of
some heads. With one row that is the sequence in its order, and any dense kernel gives what it would give on one rank; with
several, keys and values go round, and what is seen of each part is put together by its sum of exponentials.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepwell.ops.attention import Attention, AttentionKernel
from stepwell.ops.backends.partial import Seen, attend_part
from stepwell.ops.packing import Cut, Segments
from stepwell.parallel.team import Team


def spread(model: nn.Module, team: Team) -> None:
    """Attention seam: let every layer attend with the others of the team, by the kernel it has."""
    if team.size > 1:
        for module in model.modules():
            if isinstance(module, Attention):
                module.kernel = Spread(module.kernel, team)


class Spread:
    """An AttentionKernel."""

    def __init__(self, kernel: AttentionKernel, team: Team):
        self.kernel, self.team = kernel, team

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        cuts = {place: lane.cut for place, lane in enumerate(segments.lanes) if lane.cut is not None}
        whole = [place for place in range(len(segments.lengths)) if place not in cuts]
        if not cuts:
            return self.kernel(q, k, v, segments)
        rows = segments.split(torch.stack((q, k, v), dim=1))  # (tokens, 3, heads, head_dim) of each
        together = self._together([rows[place] for place in cuts], list(cuts.values()))
        made = dict(zip(cuts, together, strict=True))
        if whole:
            made.update(zip(whole, self._attend([rows[place] for place in whole]), strict=True))
        return torch.cat([made[place] for place in range(len(rows))])

    def _together(self, rows: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
        """One's own rows of each sequence, (tokens, 3, heads, head_dim) -> (tokens, heads · head_dim)"""
        heads = rows[0].shape[2] // self.team.ulysses
        mine = torch.cat(list(rows))
        parts = self.team.swap(mine.split(heads, dim=2), [_count(cuts, member) for member in self.team.row])
        row = [_Row(cut, self.team.row) for cut in cuts]
        of_members = [part.split([cut.length(member) for cut in row]) for part, member in zip(parts, self.team.row, strict=True)]
        whole = [cut.joined(list(pieces)) for cut, pieces in zip(row, zip(*of_members, strict=True), strict=True)]
        attended = self._attend(whole) if self.team.ring == 1 else self._round(whole, cuts)
        back = [cut.split(each.unflatten(1, (heads, -1))) for cut, each in zip(row, attended, strict=True)]
        given = [torch.cat([pieces[place] for pieces in back]) for place in range(self.team.ulysses)]
        all_heads = torch.cat(self.team.swap(given, [len(mine)] * self.team.ulysses), dim=1).flatten(1)
        return list(all_heads.split([len(each) for each in rows]))

    def _attend(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Each sequence's rows, all of them, (tokens, 3, heads, head_dim) -> (tokens, heads · head_dim)"""
        layout = Segments([len(each) for each in rows])
        q, k, v = torch.cat(list(rows)).unbind(1)
        return list(layout.split(self.kernel(q, k, v, layout)))

    def _round(self, whole: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
        """Each sequence's rows of this row of the ring, (tokens, 3, heads, head_dim) -> (tokens, heads · head_dim)"""
        team = self.team
        lengths = [
            [sum(_Row(cut, range(first, first + team.ulysses)).lengths) for cut in cuts]
            for first in range(0, team.size, team.ulysses)
        ]
        queries, travelling = [each[:, 0] for each in whole], torch.cat([each[:, 1:] for each in whole])
        seen: list[Seen | None] = [None] * len(whole)
        place = team.member // team.ulysses
        for hop in range(team.ring):
            here = lengths[(place - hop) % team.ring]
            for index, keys_values in enumerate(travelling.split(here)):
                part, before = attend_part(queries[index], *keys_values.unbind(1)), seen[index]
                seen[index] = part if before is None else before.with_part(part)
            if hop + 1 < team.ring:
                travelling = team.pass_on(travelling, sum(lengths[(place - hop - 1) % team.ring]))
        return [each.rows.to(queries[0].dtype).flatten(1) for each in seen if each is not None]


class _Row:
    """How what the members of one row of the ring have of a sequence makes up all that the row has, in the sequence's order."""

    def __init__(self, cut: Cut, members: range):
        self.prefix = [cut.prefix[member] for member in members]
        self.tokens = [cut.tokens[member] for member in members]
        self.first = members.start

    @property
    def lengths(self) -> list[int]:
        return [prefix + tokens for prefix, tokens in zip(self.prefix, self.tokens, strict=True)]

    def length(self, member: int) -> int:
        return self.lengths[member - self.first]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """[prefix; tokens] of each -> all of the prefix, then all of the tokens"""
        texts = [piece[:prefix] for piece, prefix in zip(pieces, self.prefix, strict=True)]
        return torch.cat([*texts, *(piece[prefix:] for piece, prefix in zip(pieces, self.prefix, strict=True))])

    def split(self, whole: Tensor) -> list[Tensor]:
        """`joined` undone"""
        parts = whole.split([*self.prefix, *self.tokens])
        count = len(self.prefix)
        return [torch.cat((parts[place], parts[count + place])) for place in range(count)]


def _count(cuts: Sequence[Cut], member: int) -> int:
    """The rows that one has of all sequences."""
    return sum(itertools.chain.from_iterable((cut.prefix[member], cut.tokens[member]) for cut in cuts))

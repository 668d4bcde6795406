"""The block that is being filled, for whoever wants to watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepwell.stages.base import State
from stepwell.stages.tokens import Codec
from stepwell.types import TextPreview

if TYPE_CHECKING:
    from stepwell.stages.unmask import Draft

MASK = "░"


def preview(old: Draft, new: Draft, state: State, codec: Codec) -> TextPreview:
    """What the refinement from `old` to `new` made of the old one's block."""
    assert state.request.text is not None
    canvas, base, size = old.canvas, len(old.settled), len(old.canvas.tokens)
    tokens = (new.settled + new.canvas.tokens)[base : base + size]
    shown: list[tuple[int, str]] = []
    for place in canvas.own[: max(0, old.prompt_tokens + old.limit - base - canvas.fixed)]:
        token, was = tokens[place], canvas.tokens[place]
        if token in codec.ends and not state.request.text.ignore_eos:
            break
        shown.append((token, "m" if token == canvas.mask else "c" if token == was else "n" if was == canvas.mask else "e"))
    return TextPreview(
        state.request.id,
        state.index,
        (base - old.prompt_tokens // size * size) // size,
        canvas.step + 1,
        len(codec.decode(old.settled[old.prompt_tokens :])),
        _text(shown, codec),
        tuple((MASK if how == "m" else codec.decode([token]), how) for token, how in shown),
        sum(how == "m" for _, how in shown),
        new.forwards,
    )


def _text(shown: Sequence[tuple[int, str]], codec: Codec) -> str:
    words, run = "", list[int]()
    for token, how in (*shown, (0, "m")):
        if how == "m":
            words += (codec.decode(run) if run else "") + MASK
            run = []
        else:
            run.append(token)
    return words[:-1]

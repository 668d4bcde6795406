"""A text in a terminal, refined before your eyes: what is certain, and the block that is being filled."""

from __future__ import annotations

import sys
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from stepwell.types import Chunk, Event, TextPreview

STYLES = {"c": "", "n": "bold green", "e": "bold yellow", "m": "dim"}  # set before, new, changed, masked


class Refining:
    """Redraws the end of a text that is longer than the terminal; it is gone when the text is done, which then is printed."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, highlight=False)
        self._live = Live(Text(), console=self._console, transient=True, auto_refresh=False)
        self.words = ""

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        if isinstance(event, Chunk):
            self.words += event.text
        if not isinstance(event, TextPreview):
            return
        shown = Text(self.words[: event.start])
        for piece, state in event.tokens:
            shown.append(piece, STYLES[state])
        lines = shown.wrap(self._console, self._console.width)
        self._live.update(Text("\n").join(lines[-max(1, self._console.height - 1) :]), refresh=True)

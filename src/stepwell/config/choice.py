"""A decision and its reason: what every automatic choice is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """A value and why it was chosen. `is_warning`: the reason says that something asked for does not apply."""

    value: str
    reason: str
    is_warning: bool = False

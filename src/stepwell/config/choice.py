"""A decision and its reason: what every automatic choice is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """A value and why it was chosen."""

    value: str
    reason: str

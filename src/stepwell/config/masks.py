"""The windows of sliding tile attention: one per timestep, layer and head, from a mask-strategy file or all the same.

The file is JSON, "timestep_layer_head" -> [frames, rows, columns] in tiles, as FastVideo's mask search writes it. All of it is
checked when a model starts, so that no request can meet a hole in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.config.paths import reason
from stepwell.errors import InvalidRequest

FIELD = "mask_strategy_file_path"
Window = tuple[int, int, int]
KEY = re.compile(r"(0|[1-9]\d{0,8})_(0|[1-9]\d{0,8})_(0|[1-9]\d{0,8})", re.ASCII)


@dataclass(frozen=True, slots=True)
class MaskStrategy:
    """windows[timestep][layer][head]"""

    windows: tuple[tuple[tuple[Window, ...], ...], ...]

    @classmethod
    def uniform(cls, window: Window, layers: int, heads: int) -> MaskStrategy:
        """One window everywhere."""
        return cls((((window,) * heads,) * layers,))

    def at(self, step: int, steps: int, layer: int) -> tuple[Window, ...]:
        """The window of each head at step `step` of `steps`.

        The file's timesteps are spread over the steps, as a window belongs to a level of noise and not to a count: with as
        many steps as the file has timesteps each takes its own.
        """
        return self.windows[step * len(self.windows) // steps][layer]


def read_mask_strategy(file: str, layers: int, heads: int) -> MaskStrategy:
    """A mask-strategy file for a model of so many attention layers and heads. Raises InvalidRequest naming file and key."""
    found: dict[tuple[int, int, int], Window] = {}
    content = _read(file)
    if not content:
        raise _wrong(file, 'it holds no windows; it takes keys such as "0_0_0": [3, 3, 3]')
    for key, value in content.items():
        place = KEY.fullmatch(key)
        if place is None:
            raise _wrong(file, f'key {_shown(key)}: must be timestep_layer_head, such as "0_0_0"')
        timestep, layer, head = (int(number) for number in place.groups())
        if layer >= layers:
            raise _wrong(file, f"key {key!r}: this model's attention layers are 0 to {layers - 1}")
        if head >= heads:
            raise _wrong(file, f"key {key!r}: this model's heads are 0 to {heads - 1}")
        found[timestep, layer, head] = _window(file, key, value)
    timesteps = 1 + max(timestep for timestep, _, _ in found)
    for timestep in range(timesteps):  # ends at the first hole, so a huge timestep costs nothing
        for layer in range(layers):
            for head in range(heads):
                if (timestep, layer, head) not in found:
                    raise _wrong(
                        file,
                        f"key '{timestep}_{layer}_{head}' is missing; {timesteps} timesteps × {layers} layers × {heads} heads "
                        "must all be there",
                    )
    return MaskStrategy(
        tuple(
            tuple(tuple(found[timestep, layer, head] for head in range(heads)) for layer in range(layers))
            for timestep in range(timesteps)
        )
    )


def _read(file: str) -> Mapping[str, Any]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise _wrong(file, f"can't be read: {reason(error)}") from None
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _unique(file, pairs))
    except (ValueError, RecursionError) as error:
        raise _wrong(file, f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _wrong(file, f"must hold an object of windows, not {type(content).__name__}")
    return content


def _unique(file: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _wrong(file, f"key {_shown(twice)} is there twice")
    return made


def _window(file: str, key: str, value: Any) -> Window:
    if not isinstance(value, list) or len(value) != 3 or any(type(size) is not int or not 1 <= size < 2**16 for size in value):
        raise _wrong(file, f"key {key!r}: {_shown(value)} must be three whole numbers of tiles from 1 on: frames, rows, columns")
    return value[0], value[1], value[2]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _wrong(file: str, text: str) -> InvalidRequest:
    return InvalidRequest(f"{FIELD} = {file!r}: {text}", param=FIELD)

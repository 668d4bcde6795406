"""Reads a denoiser's config.json into a family's own dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from stepwell.errors import WeightsError

T = TypeVar("T")


def read_config(cls: type[T], config: Mapping[str, Any], family: str) -> T:
    """The dataclass, its fields checked and defaults filled in. Raises WeightsError naming the entry."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in config.keys() - known:
        raise WeightsError(f"transformer/config.json holds {key!r}, which a {family} transformer does not have", param=key)
    try:
        return TypeAdapter(cls).validate_python(config)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise WeightsError(f"transformer/config.json: {name} = {first['input']!r}: {first['msg']}", param=name) from None


def check_sizes(counts: Mapping[str, int], layers: int) -> None:
    """Raise WeightsError unless sizes are positive and plausible, and there are at most 1024 blocks."""
    for name, count in counts.items():
        if not 1 <= count <= 2**16:
            raise WeightsError(f"transformer/config.json: {name} = {count} is not positive and plausible", param=name)
    if not 0 <= layers <= 1024:
        raise WeightsError(f"transformer/config.json: {layers} layers are not plausible", param="num_layers")

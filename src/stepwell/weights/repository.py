"""A model folder in diffusers layout, opened: its index, its denoiser's config, the defaults it ships with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.errors import ModelNotFound, WeightsError
from stepwell.weights.hub import locate


@dataclass(frozen=True, slots=True)
class Repository:
    """`index` is model_index.json, `denoiser_config` is transformer/config.json but for how its weights are quantised,
    `defaults` is generation_config.json (sampling defaults of this very checkpoint; empty where there is none)."""

    id: str
    path: Path
    index: dict[str, Any]
    denoiser_config: dict[str, Any]
    defaults: dict[str, Any]

    def has(self, part: str) -> bool:
        """Whether the index names a part, and not as null."""
        entry = self.index.get(part)
        return isinstance(entry, list) and any(name is not None for name in entry)

    def classes(self, part: str) -> tuple[str, str]:
        """(library, class) of a part, as the index names them."""
        entry = self.index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
            raise WeightsError(f"{self.path / 'model_index.json'} names no {part}", param=part)
        return entry[0], entry[1]


def open_repository(model: str) -> Repository:
    """Find a model and read what it says about itself."""
    path = locate(model)
    if not (path / "model_index.json").is_file():
        raise ModelNotFound(f"model_path = {model!r}: {path} holds no model_index.json, so it is not in diffusers layout")
    defaults = path / "generation_config.json"
    return Repository(
        id=model,
        path=path,
        index=read_json(path / "model_index.json"),
        denoiser_config=read_config(path / "transformer")[0],
        defaults=read_json(defaults) if defaults.is_file() else {},
    )


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A denoiser's config.json, and apart from it how its weights are quantised."""
    file = folder / "config.json"
    config = read_json(file)
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict | None):
        raise WeightsError(f"{file}: quantization_config must be an object", param="quantization_config")
    return config, quantization


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model repository."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing", param=path.name) from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read: {error}", param=path.name) from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object", param=path.name)
    return content

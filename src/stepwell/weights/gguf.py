"""Reads GGUF files: tensors under a model's original names, quantised in llama.cpp's formats, dequantised one at a time.

Format: github.com/ggml-org/ggml, docs/gguf.md. Parsing and dequantising are the `gguf` package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import ModelNotFound, Unsupported, WeightsError
from stepwell.weights.reader import compare_names

PREFIX = "model.diffusion_model."  # some exporters keep the name of the module around the model
METADATA = "general.architecture"


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor of a diffusers checkpoint, as rows start:stop of an original tensor, one range after the other; () is all."""

    name: str
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class OriginalNames:
    """How a family was published before diffusers: what a GGUF file says its architecture is, and, for a denoiser's
    config, what each of its tensors becomes."""

    architecture: str
    cuts: Callable[[Mapping[str, Any]], Mapping[str, tuple[Cut, ...]]]


class Gguf:
    """One GGUF file as a source of diffusers' tensors. Raises WeightsError for a file that is broken or not of this model."""

    def __init__(self, file: Path, original: OriginalNames, config: Mapping[str, Any]):
        self.place = file
        self._gguf = _package()
        self._cuts = original.cuts(config)
        if not file.is_file():
            raise ModelNotFound(f"transformer_path = '{file}': no such file", param="transformer_path")
        try:
            reader = self._gguf.GGUFReader(file)
            field = reader.get_field(METADATA)
            architecture = None if field is None else field.contents()
        except Exception as error:  # the package raises whatever numpy did
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"{file} is truncated or not a GGUF file: {reason}", param=file.name) from None
        if architecture != original.architecture:
            raise WeightsError(
                f"{file}: {METADATA} is {architecture!r}, this model takes {original.architecture!r}", param=file.name
            )
        self._tensors = {tensor.name.removeprefix(PREFIX): tensor for tensor in reader.tensors}
        compare_names(file, set(self._cuts), set(self._tensors))

    def names(self) -> set[str]:
        return {cut.name for cuts in self._cuts.values() for cut in cuts}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, stored in self._tensors.items():
            try:
                whole = torch.from_numpy(self._gguf.dequantize(stored.data, stored.tensor_type).copy())
            except (NotImplementedError, ValueError) as error:
                raise WeightsError(f"{self.place}: {name} can't be dequantised: {error}", param=name) from None
            for cut in self._cuts[name]:
                if cut.rows and len(whole) != max(stop for each in self._cuts[name] for _, stop in each.rows):
                    raise WeightsError(
                        f"{self.place}: {name} has shape {tuple(whole.shape)}, which does not fit config.json", param=name
                    )
                yield cut.name, torch.cat([whole[start:stop] for start, stop in cut.rows]) if cut.rows else whole


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise Unsupported(
            "transformer_path: reading GGUF files takes the package gguf: pip install 'stepwell[gguf]'", param="transformer_path"
        ) from None
    return gguf

"""Where a denoiser's weights come from: safetensors, a folder another library quantised, or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import ModelNotFound, Unsupported, WeightsError
from stepwell.models import parts
from stepwell.models.spec import ModelSpec, Part
from stepwell.weights.gguf import Gguf
from stepwell.weights.hub import locate
from stepwell.weights.reader import Safetensors, Source, tensor_files
from stepwell.weights.repository import Repository, read_config

OPTION = "transformer_path"


def denoiser_source(repository: Repository, spec: ModelSpec, part: Part, other: str | None) -> Source:
    """The repository's own weights of a denoiser, or those at `other` (the option `transformer_path`)."""
    if other is None:
        folder = repository.path / part.folder
        return _folder_source(folder, read_config(folder)[1], part.classes[0])
    path = Path(other).expanduser()
    if path.suffix == ".gguf":
        if spec.original is None:
            raise Unsupported(f"{OPTION} = {other!r}: {spec.name} has no GGUF files", param=OPTION)
        return Gguf(path, spec.original, repository.denoiser_config)
    if path.is_file():
        raise ModelNotFound(f"{OPTION} = {other!r} is neither a GGUF file nor a folder of safetensors", param=OPTION)
    root = locate(other, OPTION)
    folder = root / part.folder if (root / part.folder).is_dir() else root
    if not (folder / "config.json").is_file():
        return _folder_source(folder, None, part.classes[0])
    own, quantization = read_config(folder)
    for name in sorted(own.keys() & repository.denoiser_config.keys()):
        ours = repository.denoiser_config[name]
        is_said = not name.startswith("_") and None not in (own[name], ours)  # _names say which library wrote it
        if is_said and own[name] != ours:
            raise WeightsError(
                f"{OPTION} = {other!r}: its config.json has {name} = {own[name]!r}, that of {repository.id} {ours!r}",
                param=OPTION,
            )
    return _folder_source(folder, quantization, part.classes[0])


def _folder_source(folder: Path, quantization: Mapping[str, Any] | None, class_name: str) -> Source:
    return Safetensors(folder) if quantization is None else Dequantised(folder, quantization, class_name)


class Dequantised:
    """A folder whose weights torchao, bitsandbytes or quanto quantised, loaded by diffusers and widened one by one."""

    def __init__(self, folder: Path, quantization: Mapping[str, Any], class_name: str):
        self.place = folder
        method = str(quantization.get("quant_method"))
        tensor_files(folder)  # refuses pickles with our own words
        if method not in parts.QUANTISERS:
            known = ", ".join(parts.QUANTISERS)
            raise Unsupported(f"{folder / 'config.json'}: quant_method is {method!r}; known are {known}", param="quant_method")
        parts.need_quantiser(folder, method)
        parts.need_package(folder, "accelerate", "diffusers loads its quantised weights")
        model = parts.load_quantised(folder, class_name)
        if method == "bitsandbytes":
            model.dequantize()  # its weights can't be read one by one
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())

    def names(self) -> set[str]:
        return set(self._parameters)

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        while self._parameters:
            name, parameter = self._parameters.popitem()
            yield name, parameter.dequantize()  # float32 where it never was quantised

"""Fills a module built on the meta device from a source of tensors; safetensors, sharded or not, are the first."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepwell.errors import WeightsError
from stepwell.weights.repository import read_json

logger = logging.getLogger(__name__)

NAMES = ("diffusion_pytorch_model", "model")  # of diffusers, of transformers
Place = Callable[[str, Tensor], Tensor]  # from a parameter's name and values to the same values where they stay
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of one part, shards in order."""
    indexes = _canonical(folder, ".safetensors.index.json")
    if indexes:
        weight_map = read_json(indexes).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WeightsError(f"{indexes} has no weight_map from tensors to files", param=folder.name)
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise WeightsError(f"{indexes.name} names {file.name}, which is missing from {folder}", param=folder.name)
        return files
    single = _canonical(folder, ".safetensors")
    if single:
        return [single]
    pickled = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if pickled:
        raise WeightsError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}), which can run code when opened; "
            "convert them to safetensors",
            param=folder.name,
        )
    raise WeightsError(f"{folder} holds no safetensors file", param=folder.name)


def _canonical(folder: Path, suffix: str) -> Path | None:
    """The file the libraries would take: by its standard name, or the only one there is. Variants are never guessed."""
    for name in NAMES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) > 1 and not list(folder.glob("*.safetensors.index.json")):
        raise WeightsError(
            f"{folder} holds several weights ({', '.join(f.name for f in found[:3])}) and none is {NAMES[0]}{suffix}"
        )
    return found[0] if len(found) == 1 else None


class Source(Protocol):
    """Where a module's tensors come from, under the names its key map uses. `place` is what errors name."""

    place: Path

    def names(self) -> set[str]: ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, in any order, in any floating precision."""
        ...


class Safetensors:
    """The safetensors of one folder, in the precision they are stored in."""

    def __init__(self, folder: Path):
        self.place = folder
        self._files = tensor_files(folder)

    def names(self) -> set[str]:
        return {key for file in self._files for key in _keys(file)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in self._files:
            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a dict)
                    yield key, opened.get_tensor(key)


def load_weights(
    module: nn.Module,
    source: Source,
    key_map: Mapping[str, tuple[str, ...]],
    dtype: torch.dtype,
    place: Place,
    when_whole: Callable[[str], None] = lambda name: None,
    unused: tuple[str, ...] = (),
) -> None:
    """Fill a module built on the meta device, tensor by tensor: `place` says where each goes, so that what has gone to a
    file is not in memory.

    key_map: for each parameter, the checkpoint's tensors it is made of, concatenated along dimension 0; one with more
    dimensions than the parameter (a convolution that is a linear) is read as rows of it. The two sets must match exactly, but
    for tensors in whose names one of `unused` occurs, and so must every shape. when_whole: told the name of each submodule
    once all its own parameters are there; it may replace it.
    """
    wanted = {key for keys in key_map.values() for key in keys}
    found = {key for key in source.names() if key in wanted or not any(part in key for part in unused)}
    compare_names(source.place, wanted, found)
    if dropped := sorted(source.names() - found):
        logger.info("%s: %d tensors are not used (%s, …)", source.place, len(dropped), dropped[0])
    owner = {key: (name, index) for name, keys in key_map.items() for index, key in enumerate(keys)}
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    pieces: dict[str, dict[int, Tensor]] = {}
    missing = Counter(_owner(name) for name in key_map)
    for key, tensor in source.tensors():
        if key not in owner:
            continue
        name, index = owner[key]
        parts = pieces.setdefault(name, {})
        parts[index] = _as_rows(tensor, shapes[name]).to(dtype)
        if len(parts) == len(key_map[name]):
            ordered = [parts[i] for i in range(len(parts))]
            whole = torch.cat(ordered) if len(ordered) > 1 else ordered[0]
            if whole.shape != shapes[name]:
                raise WeightsError(
                    f"{source.place}: {key} has shape {tuple(tensor.shape)}, which does not fit config.json "
                    f"({name} needs {tuple(shapes[name])} in all)",
                    param=key,
                )
            _assign(module, name, place(name, whole.contiguous()))
            del pieces[name]
            missing[_owner(name)] -= 1
            if not missing[_owner(name)]:
                when_whole(_owner(name))


def _as_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    row = shape[1:].numel()
    return tensor.reshape(-1, *shape[1:]) if tensor.ndim > len(shape) and tensor.numel() % row == 0 else tensor


def _owner(parameter: str) -> str:
    """The name of the submodule a parameter belongs to."""
    return parameter.rpartition(".")[0]


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    leaf = name.rpartition(".")[2]
    module.get_submodule(_owner(name)).register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is truncated or not a safetensors file: {error}", param=file.name) from None


def compare_names(place: Path, wanted: set[str], found: set[str]) -> None:
    """Raise WeightsError unless a checkpoint holds exactly the tensors its config asks for."""
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        parts = [f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                 for what, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise WeightsError(f"{place}: the tensors do not match config.json: {'; '.join(parts)}", param=place.name)

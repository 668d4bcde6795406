"""Reading checkpoints: shards, concatenation, precision; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepwell import DiffGenerator
from stepwell.errors import WeightsError
from stepwell.weights.reader import Safetensors, load_weights

KEYS = {"weight": ("a.weight", "b.weight"), "bias": ("a.bias", "b.bias")}


def checkpoint() -> dict[str, torch.Tensor]:
    return {f"{part}.{kind}": torch.randn(*shape) for part in "ab" for kind, shape in (("weight", (2, 3)), ("bias", (2,)))}


def module() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(3, 4)


def test_parts_are_concatenated_in_order_whatever_the_files_order(tmp_path: Path) -> None:
    tensors = checkpoint()
    shards = {"x-00001.safetensors": ["b.weight", "a.bias"], "x-00002.safetensors": ["b.bias", "a.weight"]}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / name)
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    made = module()
    load_weights(made, Safetensors(tmp_path), KEYS, torch.bfloat16, lambda _, tensor: tensor)
    assert torch.equal(made.weight, torch.cat((tensors["a.weight"], tensors["b.weight"])).bfloat16())  # type: ignore[arg-type]
    (tmp_path / "x-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="x-00002.safetensors, which is missing"):
        load_weights(module(), Safetensors(tmp_path), KEYS, torch.float32, lambda _, tensor: tensor)


def test_the_sets_must_match(tmp_path: Path) -> None:
    tensors = checkpoint()
    del tensors["a.bias"]
    save_file({**tensors, "c.bias": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing \(a.bias\); 1 unexpected \(c.bias\)"):
        load_weights(module(), Safetensors(tmp_path), KEYS, torch.float32, lambda _, tensor: tensor)


def test_a_sharded_repository_makes_the_same_picture(flux_dev: Path, tmp_path: Path) -> None:
    import shutil

    sharded = tmp_path / "sharded"
    shutil.copytree(flux_dev, sharded)
    file = sharded / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        shard = f"diffusion_pytorch_model-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, file.with_name(shard))
        weight_map.update(dict.fromkeys(names[number::3], shard))
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    frames = []
    for path in (flux_dev, sharded):
        with DiffGenerator.from_pretrained(str(path), threads=1) as g:
            frames.append(g.generate("a star", width=32, height=32, num_inference_steps=2, seed=1)[0].frames.tobytes())
    assert frames[0] == frames[1]

"""The mean of models."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from training.average import WEIGHTS, main


def test_a_mean_of_weights(tmp_path: Path) -> None:
    for name, value in {"a": 1.0, "b": 2.0, "c": 6.0}.items():
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(name)
        save_file({"x": torch.full((2, 3), value, dtype=torch.bfloat16)}, tmp_path / name / WEIGHTS)
    main([*(str(tmp_path / name) for name in "abc"), "--output", str(tmp_path / "mean")])
    made = load_file(tmp_path / "mean" / WEIGHTS)["x"]
    assert made.dtype == torch.bfloat16 and bool((made == 3).all())
    assert (tmp_path / "mean" / "model_index.json").read_text() == "c"

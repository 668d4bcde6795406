"""What happens at load when fused kernels do not work here."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from stepwell.config.hardware import Hardware
from stepwell.config.resolve import resolve
from stepwell.config.schema import EngineOptions
from stepwell.engine.row_kernels import set_row_kernels
from stepwell.errors import Unsupported
from stepwell.ops.rows import PLAIN, RowMaths


def test_kernels_that_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stepwell.ops.kernels.rows", None)
    model = nn.Sequential(RowMaths())
    hardware = Hardware(gpu="H100", triton="3.9")
    plan = resolve(EngineOptions(fused_kernels=True), parameters=1000, text_encoders=2, hardware=hardware)
    with pytest.raises(Unsupported, match="fused_kernels = True"):
        set_row_kernels(model, plan, (2, 8), torch.float32)
    assert model[0].kernels is PLAIN

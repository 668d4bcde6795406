"""What happens at load when fused kernels do not work here."""

from __future__ import annotations

import logging
import sys

import pytest
from torch import nn

from stepwell.config.hardware import Hardware
from stepwell.config.resolve import Choice, resolve
from stepwell.config.schema import EngineOptions
from stepwell.engine.build import set_row_kernels
from stepwell.errors import Unsupported
from stepwell.ops.rows import PLAIN, RowMaths
from stepwell.types import replace


def test_kernels_that_fail_leave_eager_ones_or_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "stepwell.ops.kernels.rows", None)
    model = nn.Sequential(RowMaths())
    plan = resolve(EngineOptions(device="cpu"), parameters=1000, text_encoders=2, hardware=Hardware())
    plan = replace(plan, row_kernels=Choice("triton", "Triton is there"))
    with caplog.at_level(logging.WARNING, "stepwell"):
        chosen = set_row_kernels(model, plan, (2, 8), EngineOptions())
    assert chosen.value == "plain" and "failed their trial" in chosen.reason
    assert model[0].kernels is PLAIN
    assert "fused kernels are off" in caplog.text
    with pytest.raises(Unsupported, match="fused_kernels = 'on'"):
        set_row_kernels(model, plan, (2, 8), EngineOptions(fused_kernels="on"))

"""Stepwell: one engine for diffusion models.

from stepwell import DiffGenerator

with DiffGenerator.from_pretrained("stepwell/tiny-flux") as g:
    g.generate(prompt="a small red circle on a white background")[0].image.save("circle.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepwell.errors import StepwellError
from stepwell.types import Request, SamplingParams

if TYPE_CHECKING:
    from stepwell.generator import DiffGenerator

__version__ = "0.1.0"
__all__ = ["DiffGenerator", "Request", "SamplingParams", "StepwellError", "__version__"]


def __getattr__(name: str) -> object:
    if name == "DiffGenerator":  # its imports cost seconds; `stepwell --help` must not pay them
        from stepwell.generator import DiffGenerator

        return DiffGenerator
    raise AttributeError(f"module 'stepwell' has no attribute {name!r}")

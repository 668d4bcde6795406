"""Guidance: which forwards a step needs, and how their predictions become one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepwell.types import Request


def branch_prompts(request: Request) -> tuple[str, ...]:
    """The prompts a step is computed for: the prompt, and the negative one under classifier-free guidance."""
    sampling = request.sampling
    assert sampling.true_cfg_scale is not None
    if sampling.negative_prompt is not None and sampling.true_cfg_scale > 1:
        return request.prompt, sampling.negative_prompt
    return (request.prompt,)


def combine(predictions: Sequence[Tensor], scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): v = v₋ + s (v₊ − v₋). One branch is returned as it is."""
    if len(predictions) == 1:
        return predictions[0]
    positive, negative = predictions
    return negative + scale * (positive - negative)

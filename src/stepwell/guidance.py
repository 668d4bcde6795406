"""Guidance: which forwards a step needs, and how their predictions become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from stepwell.types import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Guider:
    """Classifier-free guidance (Ho & Salimans 2022), as a family turns it on.

    It is on where `scale` is above 1 and there is a negative prompt: the request's, or else `negative`; None asks for one.
    `late_scale` is that of a second denoiser.
    """

    scale: Callable[[SamplingParams], float | None]
    late_scale: Callable[[SamplingParams], float | None]
    negative: str | None = None

    def prompts(self, request: Request) -> tuple[str, ...]:
        """The prompts a step is computed for: the prompt, and the negative one under guidance."""
        given = request.sampling.negative_prompt
        negative = self.negative if given is None else given
        return (request.prompt,) if negative is None or (self.scale(request.sampling) or 0) <= 1 else (request.prompt, negative)

    def combine(self, predictions: Sequence[Tensor], request: Request, *, is_late: bool) -> Tensor:
        """v = v₋ + s (v₊ − v₋). One branch is returned as it is."""
        if len(predictions) == 1:
            return predictions[0]
        positive, negative = predictions
        scale = (self.late_scale if is_late else self.scale)(request.sampling)
        assert scale is not None
        return negative + scale * (positive - negative)


def _true_scale(sampling: SamplingParams) -> float | None:
    return sampling.true_cfg_scale


def _guidance_scale(sampling: SamplingParams) -> float | None:
    return sampling.guidance_scale


def _late_scale(sampling: SamplingParams) -> float | None:
    return sampling.guidance_scale if sampling.guidance_scale_2 is None else sampling.guidance_scale_2


def _no_scale(sampling: SamplingParams) -> float | None:
    return None


# of models that were distilled to need none
NO_CFG = Guider(_no_scale, _no_scale)
# beside distilled guidance, which is `guidance_scale` (FLUX.1, HunyuanVideo)
TRUE_CFG = Guider(_true_scale, _true_scale)
# where `guidance_scale` itself is the classifier-free one (Wan)
PLAIN_CFG = Guider(_guidance_scale, _late_scale, negative="")

"""Step computation masks (SCM): which steps must be computed, whatever their residuals say. Without torch.

The presets are those of cache-dit for 28 steps (`cache_interface.steps_mask`). Its rule for other step counts truncates bins,
which leaves runs of up to 15 cached steps; here the 28-step mask is resampled, so that its density over the schedule stays
what it is, and no run is longer than `mc`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise, repeat, zip_longest

from stepwell.types import CacheParams

PRESETS = {
    "slow": "1111111101110011100110010001",
    "medium": "1111110110001100011000110001",
    "fast": "1111110100010000100000100001",
    "ultra": "1111001000001000000100000001",
}
LEAST_STEPS = 8  # with fewer a preset has nothing to skip; the residuals alone decide then


def step_mask(cache: CacheParams, steps: int) -> tuple[bool, ...] | None:
    """For each step, whether it must be computed; None if no mask was asked for, or none fits so few steps."""
    if cache.scm_compute_bins is not None and cache.scm_cache_bins is not None:
        return bins_mask(cache.scm_compute_bins, cache.scm_cache_bins, steps)
    if cache.scm_preset in (None, "none") or steps < LEAST_STEPS:
        return None
    assert cache.scm_preset is not None and cache.mc is not None
    return preset_mask(cache.scm_preset, steps, cache.mc)


def preset_mask(preset: str, steps: int, longest: int) -> tuple[bool, ...]:
    """A preset for any number of steps. The first and the last step are computed, and no more than `longest` in a row are
    cached (below 0: any number)."""
    table = [bit == "1" for bit in PRESETS[preset]]
    density = [0.0, *(float(total) for total in accumulate(table))]

    def computed_before(step: int) -> float:
        """The computed steps that the preset has up to here, scaled to `steps`."""
        place = step * len(table) / steps
        whole = min(int(place), len(table) - 1)
        return (density[whole] + (place - whole) * table[whole]) * steps / len(table)

    wanted = [math.ceil(computed_before(step) - 1e-9) for step in range(steps + 1)]
    mask = [after > before for before, after in pairwise(wanted)]
    mask[0] = mask[-1] = True
    return _bounded(mask, longest)


def _bounded(mask: list[bool], longest: int) -> tuple[bool, ...]:
    run = 0
    for step, is_computed in enumerate(mask):
        run = 0 if is_computed else run + 1
        if 0 <= longest < run:
            mask[step], run = True, 0
    return tuple(mask)


def bins_mask(compute: Sequence[int], cached: Sequence[int], steps: int) -> tuple[bool, ...]:
    """Alternate runs of computed and cached steps. Where they do not reach the end, the last pair goes on."""
    pairs = list(zip_longest(compute, cached, fillvalue=0))
    last = (compute[-1], cached[-1])
    runs = chain(pairs, repeat(last))
    mask: list[bool] = []
    while len(mask) < steps:
        computed_run, cached_run = next(runs)
        mask += [True] * min(computed_run, steps) + [False] * min(cached_run, steps)
    return tuple(mask[:steps])

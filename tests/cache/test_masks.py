"""Step masks: every number of steps has one, no run is too long, and 28 steps are cache-dit's."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.cache.masks import PRESETS, bins_mask, preset_mask, step_mask
from stepwell.cache.params import DEFAULTS
from stepwell.types import CacheParams, replace


def longest_run(mask: tuple[bool, ...]) -> int:
    return max((len(list(run)) for computed, run in groupby(mask) if not computed), default=0)


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 400), st.integers(-1, 9))
def test_any_number_of_steps(preset: str, steps: int, longest: int) -> None:
    mask = preset_mask(preset, steps, longest)
    assert len(mask) == steps and mask[0] and mask[-1]
    assert longest < 0 or longest_run(mask) <= longest


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_28_steps_are_those_of_cache_dit(preset: str) -> None:
    import cache_dit

    assert [int(computed) for computed in preset_mask(preset, 28, -1)] == cache_dit.steps_mask(total_steps=28, mask_policy=preset)


@given(st.integers(8, 400), st.sampled_from((-1, 2, 3, 4, 5)))  # a longest run of 1 makes them all alike
def test_faster_presets_compute_less(steps: int, longest: int) -> None:
    computed = [sum(preset_mask(preset, steps, longest)) for preset in ("slow", "medium", "fast", "ultra")]
    assert computed == sorted(computed, reverse=True) and computed[0] > computed[-1]


@given(st.sampled_from(sorted(PRESETS)), st.integers(8, 400))
def test_a_preset_keeps_its_density(preset: str, steps: int) -> None:
    """Rounded up, and the last step."""
    assert 0 <= sum(preset_mask(preset, steps, -1)) - steps * PRESETS[preset].count("1") / 28 + 1e-9 < 2


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.lists(st.integers(1, 3), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_bins_go_on_where_they_end(compute: list[int], cached: list[int], steps: int) -> None:
    cached = cached[: len(compute)]
    mask = bins_mask(compute, cached, steps)
    assert len(mask) == steps
    assert longest_run(mask) <= max(cached)
    assert mask[: compute[0]] == (True,) * min(compute[0], steps)


def test_the_documents_bins() -> None:
    mask = bins_mask((8, 3, 3, 2, 2), (1, 2, 2, 2, 3), 50)
    assert "".join("01"[computed] for computed in mask[:28]) == "1111111101110011100110011000"
    assert "".join("01"[computed] for computed in mask[28:38]) == "1100011000"


def test_too_few_steps_have_no_preset() -> None:
    fast = replace(DEFAULTS["dbcache"], scm_preset="fast")
    assert step_mask(fast, 7) is None and step_mask(fast, 8) is not None
    assert step_mask(DEFAULTS["dbcache"], 28) is None
    assert step_mask(CacheParams(scm_compute_bins=(1,), scm_cache_bins=(1,)), 5) == (True, False, True, False, True)


def test_the_documents_table() -> None:
    lines = Path("docs/step-cache.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and line[2:3].isdigit()]
    assert len(rows) > 5
    for steps, *shares in rows:
        wanted = [sum(preset_mask(preset, int(steps), 3)) / int(steps) for preset in ("slow", "medium", "fast", "ultra")]
        assert shares == [f"{share:.0%}" for share in wanted]

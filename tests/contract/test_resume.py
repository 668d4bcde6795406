"""A sample saved between two steps and taken up by another engine is, bit for bit, what it would have become: every model's
promise. How saving works, and what it makes of damage, is in tests/engine/test_checkpoints.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from stepwell.engine.local import LocalEngine
from stepwell.types import CacheParams, Done, Event, Failed, Progress, Request, replace
from tests.contract.test_contract import collect, mixed, opened
from tests.support.families import Family

FIXED = {"attention_backend": "torch_sdpa", "linear_backend": "torch"}  # auto measures, and may choose another the next time
CACHES = {
    "no cache": None,
    "dbcache": CacheParams(method="dbcache", rdt=1.0, warmup=1, mc=2, taylorseer=True, ts_order=2),
    "first_block": CacheParams(method="first_block", rdt=0.3),
    "teacache": CacheParams(method="teacache", rdt=0.5),
}


class Life:
    """What an engine told of some requests until they ended, or until it was shut, once all had taken `until` steps."""

    def __init__(self, engine: LocalEngine, requests: Sequence[Request], until: int | None = None):
        self.steps: dict[tuple[str, int], list[int]] = {}
        self.done: dict[str, Done] = {}
        self._over = threading.Event()
        self._samples = sum(asked.sampling.num_outputs or 1 for asked in requests)
        self._engine, self._requests, self._until = engine, requests, until
        for asked in requests:
            engine.submit(asked, self._take)
        assert self._over.wait(120)
        engine.shut()

    def _take(self, event: Event) -> None:
        if isinstance(event, Progress) and event.stage.startswith("denoise") and event.step:
            self.steps.setdefault((event.request_id, event.index), []).append(event.step)
            far = [steps for steps in self.steps.values() if self._until and steps[-1] >= self._until]
            if len(far) == self._samples:
                self._engine.shut()  # from its own thread: no step comes after this one
        if isinstance(event, Done):
            self.done[event.request_id] = event
            self._engine.forget(next(asked for asked in self._requests if asked.id == event.request_id))
        if isinstance(event, Done | Failed) and (len(self.done) == len(self._requests) or isinstance(event, Failed)):
            self._over.set()


@pytest.mark.parametrize("cache", CACHES)
def test_saved_mid_denoise_and_resumed_is_uninterrupted(family: Family, repository: Path, tmp_path: Path, cache: str) -> None:
    """All kinds of requests at once: two guidance branches, several outputs, a picture to start from."""
    if cache == "teacache" and not family.spec.teacache:
        pytest.skip("nobody has fitted TeaCache's coefficients for this model")
    asked = [replace(one, sampling=replace(one.sampling, cache=CACHES[cache], num_inference_steps=8)) for one in mixed(family)]
    plain = opened(repository, **FIXED)
    whole = {one.id: collect(plain, one) for one in asked}
    plain.shut()
    saving = {**FIXED, "checkpoint_path": str(tmp_path), "checkpoint_interval_s": 0}
    lives = [Life(opened(repository, **saving), asked, until) for until in (1, 3, None)]
    assert not lives[0].done and len(lives[1].done) < len(asked), "nothing was cut short"
    for one in asked:
        before, after = whole[one.id].outputs, lives[-1].done[one.id].outputs
        assert [output.frames for output in after] == [output.frames for output in before]
        assert [output.cache for output in after] == [output.cache for output in before]
        for index in range(len(before)):
            taken = [step for life in lives for step in life.steps.get((one.id, index), [])]
            assert taken == list(range(1, taken[-1] + 1)), "a step was taken twice, or left out"
    if cache in ("dbcache", "teacache"):
        assert any(not all(output.cache.computed_steps) for done in whole.values() for output in done.outputs)  # type: ignore[union-attr]
    assert not list(tmp_path.iterdir())

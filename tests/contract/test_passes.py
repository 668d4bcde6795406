"""What every pass promises, alone and with every other one: the same bits in company as alone, previews and aborts included."""

from __future__ import annotations

import threading
from itertools import combinations
from pathlib import Path

import pytest
from torch import Tensor, nn

from stepwell.engine import build
from stepwell.engine.build import split_linears
from stepwell.engine.local import LocalEngine
from stepwell.ops.blocks import Blocks
from stepwell.ops.linear import Linear, PackedLinear
from stepwell.ops.packing import Segments
from stepwell.quant.int8 import Int8Dynamic
from stepwell.types import CacheParams, Done, Event, Failed, Preview, Progress, Request, replace
from tests.contract.test_contract import collect, largest_batch, mixed, opened, settle
from tests.contract.test_contract import request as asking
from tests.support.families import Family

CACHES = (
    CacheParams("dbcache", fn=1, bn=1, warmup=1, rdt=0.9, mc=2, taylorseer=True),
    CacheParams("none"),
    CacheParams("first_block", rdt=0.6),
    CacheParams("dbcache", warmup=1, scm_compute_bins=(1, 1), scm_cache_bins=(1, 1), scm_policy="static"),
    CacheParams("dbcache", fn=2, warmup=0, rdt=0.9, taylorseer=True, ts_order=2),
)
PASSES: dict[str, dict[str, object]] = {
    "cache": {"cache_method": "dbcache", "cache_dit_warmup": 1, "cache_dit_rdt": 0.9, "cache_dit_taylorseer": True},
    "bf16": {"dit_precision": "bf16"},
    "int8": {"quantization": "int8_dynamic"},
    "offload": {"dit_layerwise_offload": True},
    "compile": {"enable_torch_compile": True},
    "sparse attention": {"attention_backend": "block_sparse_torch"},
    "slots": {},  # see `slotted`
}


class Slot(nn.Module):
    """Where a LoRA adapter will be: a linear that adds nothing yet."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        assert sum(segments.lengths) == len(x) and len(segments.lanes) == len(segments.lengths)
        return self.layer(x, segments)  # type: ignore[no-any-return]


@pytest.fixture
def slotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of the test's own, at the linear seam, between those of the engine: every linear of the blocks in a slot."""

    def split_and_wrap(denoiser: nn.Module, names: list[str]) -> None:
        plain = [
            f"{place}.{name}"
            for place, blocks in denoiser.named_modules()
            if isinstance(blocks, Blocks)
            for name, layer in blocks.named_modules()
            if isinstance(layer, Linear | PackedLinear | Int8Dynamic)
        ]
        split_linears(denoiser, names)
        for name in plain:
            denoiser.set_submodule(name, Slot(denoiser.get_submodule(name)))
        assert plain, "nothing was wrapped, so nothing was tested"

    monkeypatch.setattr(build, "split_linears", split_and_wrap)


def with_cache(asked: Request, cache: CacheParams) -> Request:
    return replace(asked, sampling=replace(asked.sampling, cache=cache))


# ------------------------------------------------------------------------------------------------------------------ cache
@pytest.mark.parametrize("method", ["dbcache", "first_block", "teacache"])
def test_a_cache_that_computes_every_step_changes_no_bit(family: Family, engine: LocalEngine, method: str) -> None:
    if method == "teacache" and not family.spec.teacache:
        pytest.skip("nobody has fitted its coefficients to this model")
    asked = [asking(num_inference_steps=5, guidance_scale=2.0), asking(true_cfg_scale=2.0, negative_prompt="dark")]
    for each in asked:
        plain = collect(engine, each)
        cached = collect(engine, with_cache(replace(each, id=each.id + "c"), CacheParams(method, rdt=0.0)))
        assert cached.outputs[0].frames == plain.outputs[0].frames
        assert cached.outputs[0].cache is not None and cached.outputs[0].cache.computed_ratio == 1.0


def test_caches_of_all_kinds_in_one_batch(family: Family, engine: LocalEngine) -> None:
    """Every sample has a cache of its own kind, state and decisions; some skip while others compute."""
    requests = [with_cache(each, cache) for each, cache in zip(mixed(family), CACHES, strict=True)]
    check_company(engine, requests)
    reports = [output.cache for each in requests for output in collect(engine, replace(each, id=each.id + "r")).outputs]
    assert any(report is not None and not all(report.computed_steps) for report in reports)


# ------------------------------------------------------------------------------------------------------------------ pairs
@pytest.mark.parametrize("names", list(combinations(PASSES, 2)), ids=" + ".join)
def test_every_two_passes_together(
    names: tuple[str, str], family: Family, repository: Path, request: pytest.FixtureRequest
) -> None:
    if "slots" in names:
        request.getfixturevalue("slotted")
    engine = opened(repository, **PASSES[names[0]], **PASSES[names[1]])
    try:
        check_company(engine, mixed(family))
    finally:
        engine.shut()


def check_company(engine: LocalEngine, requests: list[Request]) -> None:
    """Requests make the same pictures together, with previews and beside one that is aborted midway, as each alone."""
    alone = [collect(engine, replace(each, id=f"{each.id}-alone")) for each in requests]
    victim = replace(asking("a black star", num_inference_steps=40, seed=77), image=requests[0].image)
    company = [replace(each, preview_every=2) for each in requests]
    ends: dict[str, Event] = {}
    previews: list[Preview] = []
    over = threading.Semaphore(0)

    def sink(event: Event) -> None:
        if isinstance(event, Preview):
            previews.append(event)
        if isinstance(event, Progress) and event.request_id == victim.id and event.stage == "denoise" and event.step == 2:
            engine.cancel(victim.id)
        if isinstance(event, Done | Failed):
            ends[event.request_id] = event
            over.release()

    for each in (company[0], victim, *company[1:]):
        engine.submit(each, sink)
    for _ in range(len(company) + 1):
        assert over.acquire(timeout=120)
    assert isinstance(ends[victim.id], Failed)
    for each, before in zip(company, alone, strict=True):
        after = ends[each.id]
        assert isinstance(after, Done), after
        assert [o.frames.data for o in after.outputs] == [o.frames.data for o in before.outputs]
        assert [o.cache for o in after.outputs] == [o.cache for o in before.outputs]
    assert previews
    assert largest_batch(engine) > 1, "nothing was ever packed, so nothing was tested"
    settle(engine)

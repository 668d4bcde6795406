"""The step cache against the libraries it must agree with: the same decisions, the same latents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from stepwell.api.answers import cache_answer
from stepwell.cache.masks import preset_mask
from stepwell.cache.memory import CacheMemory, Verdict
from stepwell.models.flux import DEV, KEPT_PARTS, FluxPacked, FluxPrepared
from stepwell.ops.packing import Lane
from stepwell.types import CacheParams, CacheReport, Request, SamplingParams
from tests.support.driving import final_latents, worker_of
from tests.support.repositories import flux_repository

STEPS = 20


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three double and three single blocks, so that first, skipped and last blocks are of both kinds."""
    config = {**DEV.tiny, "num_layers": 3, "num_single_layers": 3}
    schedule = {"use_dynamic_shifting": True, "shift": 3.0}
    return flux_repository(tmp_path_factory.mktemp("cache"), config, schedule=schedule)


def ours(path: Path, cache: CacheParams) -> tuple[torch.Tensor, CacheReport]:
    """Final latents and what the cache did."""
    sampling = SamplingParams(
        width=64, height=48, num_inference_steps=STEPS, seed=7, max_sequence_length=16, guidance_scale=3.5, cache=cache
    )
    worker = worker_of(path, threads=1)
    reports: list[CacheReport] = []
    denoise = worker._stages["denoise"]
    original: Callable[..., list[bool]] = denoise.run

    def run(items: Any) -> list[bool]:
        done = original(items)
        reports.extend(state.cache for state, _ in items if state.cache is not None)
        return done

    denoise.run = run  # type: ignore[method-assign]
    latents = final_latents(worker, Request("two green triangles", sampling))
    return latents, reports[0]


def test_batches_of_some_lanes_are_kept_only_for_a_while() -> None:
    """A step cache that decides differently at every step asks for another set of lanes each time."""
    lanes = [Lane(FluxPrepared(torch.ones(2, 3), torch.ones(1, 3), torch.ones(3, 2)), 9, 2, (1, 1, 1)) for _ in range(6)]
    packed = FluxPacked.of(lanes)
    sets = [places for count in range(1, 6) for places in combinations(range(6), count)]
    for places in sets:
        some = packed.only(places)
        assert some.lanes == tuple(lanes[place] for place in places) and packed.only(places) is some
        assert len(packed.parts) <= KEPT_PARTS
    usual = packed.only((0, 1))
    for places in sets[:10]:
        packed.only(places)
        assert packed.only((0, 1)) is usual, "what is asked for at every step stays"


def theirs(path: Path, attach: Callable[[FluxPipeline], None]) -> torch.Tensor:
    pipe = FluxPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    attach(pipe)
    latents: torch.Tensor = pipe(
        "two green triangles",
        width=64,
        height=48,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images[0]
    return latents


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no warm-up": {"warmup": 0, "rdt": 0.5},
    "order 1": {"taylorseer": True},
    "order 2": {"taylorseer": True, "ts_order": 2, "rdt": 0.5},
    "the documents' example": {"fn": 2, "bn": 1, "warmup": 4, "rdt": 0.4, "mc": 4, "taylorseer": True, "ts_order": 2},
    "last blocks of both kinds": {"fn": 1, "bn": 4, "rdt": 0.3},
    "always": {"rdt": 1.0, "mc": 2},
    "unbounded": {"mc": -1, "rdt": 0.6, "taylorseer": True},
    "mask": {"scm_preset": "medium", "taylorseer": True, "rdt": 0.5},
    "mask, static": {"scm_preset": "fast", "scm_policy": "static", "warmup": 2},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_dbcache_decides_and_predicts_as_cache_dit(repository: Path, changes: dict[str, Any]) -> None:
    import cache_dit

    logging.getLogger("cache_dit").setLevel(logging.ERROR)
    cache = CacheParams(
        **{"method": "dbcache", "fn": 1, "bn": 0, "warmup": 4, "rdt": 0.24, "mc": 3, **changes}  # type: ignore[arg-type]
    )
    mask = None
    if cache.scm_preset is not None:
        assert cache.mc is not None
        mask = [int(computed) for computed in preset_mask(cache.scm_preset, STEPS, cache.mc)]
    stats: list[Any] = []

    def attach(pipe: FluxPipeline) -> None:
        calibrator = {}
        if cache.taylorseer:
            calibrator["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=cache.ts_order or 1)
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=cache.fn,
                Bn_compute_blocks=cache.bn,
                max_warmup_steps=cache.warmup,
                residual_diff_threshold=cache.rdt,
                max_continuous_cached_steps=cache.mc,
                num_inference_steps=STEPS,
                steps_computation_mask=mask,
                steps_computation_policy=cache.scm_policy or "dynamic",
            ),
            **calibrator,
        )
        stats.append(pipe)

    reference = theirs(repository, attach)
    (summary,) = cache_dit.summary(stats[0], logging=False)
    latents, report = ours(repository, cache)
    cached = [step for step, computed in enumerate(report.computed_steps) if not computed]
    assert cached == sorted(summary.cached_steps) and cached, "nothing was cached, so nothing was compared"
    if cache.rdt is not None and cache.rdt < 1:  # from 1 on cache-dit notes -1 and measures nothing
        measured = {str(step): change for step, change in enumerate(report.residuals) if change is not None}
        assert measured == pytest.approx(summary.residual_diffs, abs=1e-4)
    assert (latents - reference).abs().max() <= 1e-4
    assert len(report.computed_steps) == STEPS
    ran = sum(6 if computed else (cache.fn or 0) + (cache.bn or 0) for computed in report.computed_steps)
    assert report.computed_ratio == pytest.approx(ran / (6 * STEPS))


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5])
def test_first_block_cache_is_that_of_diffusers(repository: Path, threshold: float) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    def attach(pipe: FluxPipeline) -> None:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    reference = theirs(repository, attach)
    latents, report = ours(repository, CacheParams(method="first_block", rdt=threshold))
    assert (latents - reference).abs().max() <= 1e-4
    if threshold > 0.1:
        assert not all(report.computed_steps)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.8])
def test_teacache_is_its_paper_loop(repository: Path, threshold: float) -> None:
    """Against the loop of TeaCache4FLUX written down plainly on diffusers' modules."""
    skipped: list[bool] = []

    def attach(pipe: FluxPipeline) -> None:
        teach(pipe.transformer, threshold, skipped)

    reference = theirs(repository, attach)
    latents, report = ours(repository, CacheParams(method="teacache", rdt=threshold))
    assert [not computed for computed in report.computed_steps] == skipped
    assert (latents - reference).abs().max() <= 1e-4
    if threshold >= 0.3:
        assert any(skipped)


def teach(model: Any, threshold: float, skipped: list[bool]) -> None:
    """Wrap all blocks of a diffusers FLUX transformer into one decision a step."""
    first, last = model.transformer_blocks[0], model.single_transformer_blocks[-1]
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    originals = {block: block.forward for block in blocks}
    memory: dict[str, Any] = {"step": 0, "moved": 0.0, "input": None, "start": None, "residual": None, "skip": False}

    def decide(image: torch.Tensor, temb: torch.Tensor) -> bool:
        signal = first.norm1(image, emb=temb)[0]
        skip = False
        if memory["step"] not in (0, STEPS - 1):
            change = ((signal - memory["input"]).abs().mean() / memory["input"].abs().mean()).item()
            powers = zip(DEV.teacache, range(4, -1, -1), strict=True)
            memory["moved"] += abs(sum(coefficient * change**power for coefficient, power in powers))
            skip = memory["moved"] < threshold
        if not skip:
            memory["moved"] = 0.0
        memory["input"] = signal
        skipped.append(skip)
        memory["step"] += 1
        return skip

    def wrapped(block: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        def forward(
            hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, **rest: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if block is first:
                memory["skip"], memory["start"] = decide(hidden_states, temb), hidden_states
            if not memory["skip"]:
                text, image = originals[block](hidden_states, encoder_hidden_states, temb, **rest)
                if block is last:
                    memory["residual"] = image - memory["start"]
                return text, image
            return encoder_hidden_states, hidden_states + memory["residual"] if block is last else hidden_states

        return forward

    for block in blocks:
        block.forward = wrapped(block)


def test_a_step_that_is_tried_again_counts_once() -> None:
    memory = CacheMemory.of(CacheParams("dbcache", 1, 0, 0, 0.5, 3, False, 1, "none", "dynamic"), 4, ())
    assert memory is not None
    value = torch.ones(2, 3)
    for step in (0, 1, 1, 2, 2, 2):
        memory.begin(step)
        memory.note_computed(value * step, (value,), None, 3)
    assert len(memory.known.computed) == 3 and memory.known.blocks_run == 9


def test_a_threshold_of_0_computes_every_step_whatever_the_mask() -> None:
    static = CacheParams("dbcache", 1, 0, 0, 0.0, 3, False, 1, "fast", "static")
    memory = CacheMemory.of(static, 12, ())
    assert memory is not None
    for step in range(12):
        memory.begin(step)
        assert memory.verdict() is Verdict.COMPUTE
        memory.note_computed(torch.ones(2, 3), (torch.ones(2, 3),), None, 3)


def test_a_change_that_is_no_number_is_answered_as_none() -> None:
    answer = cache_answer(CacheReport(1.0, (True, True), (float("nan"), float("inf"))))
    assert answer is not None and answer["residuals"] == [None, None]

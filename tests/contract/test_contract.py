"""What every model promises. A family inherits all of it from its spec's `tiny` config (see tests/support/families.py)."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stepwell.config.schema import EngineOptions
from stepwell.engine.api import StatsReply
from stepwell.engine.intake import complete
from stepwell.engine.local import LocalEngine
from stepwell.generator import open_engine
from stepwell.offload.layers import Streamed
from stepwell.types import Done, Event, Failed, Frames, Preview, Progress, Request, SamplingParams, replace
from tests.support.driving import final_latents, worker_of
from tests.support.families import VARIANTS, Family
from tests.support.ranks import ranked_engine

STATES = ("State", "DualPacked", "DualPrepared", "WanPacked", "WanPrepared")


def request(prompt: str = "a red circle", **sampling: object) -> Request:
    defaults: dict[str, object] = {"width": 32, "height": 32, "num_inference_steps": 3, "seed": 5, "max_sequence_length": 16}
    return Request(prompt, SamplingParams(**{**defaults, **sampling}))  # type: ignore[arg-type]


def opened(path: Path, **options: object) -> LocalEngine:
    made = open_engine(EngineOptions(model_path=str(path), threads=1, max_batch_tokens=4096, **options))  # type: ignore[arg-type]
    made.open()
    return made


def collect(engine: LocalEngine, asked: Request) -> Done:
    *_, last = engine.stream(asked)
    assert isinstance(last, Done), last
    return last


# ------------------------------------------------------------------------------------------------- the same as diffusers
@pytest.mark.parametrize("case", range(3))
def test_parity_with_the_reference_pipeline(family: Family, case: int, tmp_path: Path) -> None:
    check_parity(family, case, tmp_path)


@pytest.mark.parametrize("case", range(2))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.spec.name)
def test_parity_of_every_variant(variant: Family, case: int, tmp_path: Path) -> None:
    check_parity(variant, case, tmp_path)


def check_parity(family: Family, case: int, tmp_path: Path) -> None:
    path = family.write(tmp_path, family.odd_configs[case % len(family.odd_configs)])
    worker, engine = worker_of(path, threads=1), open_engine(EngineOptions(model_path=str(path), threads=1))
    engine.open()
    width, height = family.sizes[case % len(family.sizes)]
    asked = [
        request("a small red circle on a white background", width=width, height=height, guidance_scale=3.5, true_cfg_scale=1.0),
        request("“two”，green &amp; ﬁne  triangles", width=height, height=width, seed=11, num_inference_steps=4,
                guidance_scale=0.0, true_cfg_scale=2.5, negative_prompt="blurry"),
    ]  # fmt: skip
    for each in asked:
        if all(task.takes_image for task in family.spec.tasks):
            sampling = replace(each.sampling, max_sequence_length=512)  # the reference takes no other with an image encoder
            each = replace(each, image=picture(), sampling=sampling)
        reference = family.reference(path, each)
        latents = final_latents(worker, each)
        assert (latents - reference.latents).abs().max() <= 1e-4
        frames = collect(engine, each).outputs[0].frames
        pixels = np.frombuffer(frames.data, np.uint8).reshape(reference.pixels.shape)
        assert (frames.height, frames.width) == pixels.shape[-3:-1]
        assert np.abs(pixels.astype(int) - reference.pixels.astype(int)).max() <= 1
    engine.shut()


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_parity_when_starting_from_a_picture(family: Family, strength: float, repository: Path) -> None:
    asked = from_picture(num_inference_steps=5, strength=strength, width=48)
    reference = family.reference(repository, asked)
    worker = worker_of(repository, threads=1)
    assert (final_latents(worker, asked) - reference.latents).abs().max() <= 1e-4


def from_picture(**sampling: object) -> Request:
    """A request that starts from a picture of another size than it makes."""
    return replace(request(guidance_scale=3.5, **sampling), image=picture())


def picture() -> Frames:
    return Frames(np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8).tobytes(), 1, 40, 50)


def test_key_map_covers_the_checkpoint_both_ways(family: Family) -> None:
    config = dict(family.spec.tiny)
    key_map = family.spec.key_map(config)
    with torch.device("meta"):
        ours = {name for name, _ in family.spec.build_denoiser(config).named_parameters()}
    assert set(key_map) == ours
    used = [key for keys in key_map.values() for key in keys]
    assert len(used) == len(set(used))
    assert set(used) == family.checkpoint_keys(config)


# ------------------------------------------------------------------------------------------- batch ≡ alone, bit for bit
def mixed(family: Family) -> list[Request]:
    """Other sizes, steps, seeds, guidance, prompt lengths, one with two guidance branches, one with two outputs; and one that
    starts from a picture, or is one. All do where the model makes nothing without."""
    (w0, h0), (w1, h1), (w2, h2) = family.sizes[:3]
    always = all(task.takes_image for task in family.spec.tasks)
    made = [
        request("a red circle", width=w0, height=h0, num_inference_steps=6, guidance_scale=3.5),
        request("two stars", width=w1, height=h1, num_inference_steps=4, seed=6, guidance_scale=1.0, max_sequence_length=24),
        request("a blue square", width=w2, height=h2, num_inference_steps=5, seed=7, true_cfg_scale=3.0, negative_prompt="dark"),
        request("a white triangle", width=w0, height=h0, num_inference_steps=3, seed=8, num_outputs=2),
        from_picture(num_inference_steps=5, strength=0.5, seed=9)
        if any(task.takes_image for task in family.spec.tasks)
        else request("a green square", num_inference_steps=5, seed=9, num_frames=1),
    ]
    return [replace(asked, image=picture()) for asked in made] if always else made


def test_mixed_batch_is_bit_identical_to_each_alone(family: Family, engine: LocalEngine) -> None:
    check_batch_is_alone(family, engine)


def test_mixed_batch_is_bit_identical_where_kernels_depend_on_the_rows(family: Family, tmp_path: Path) -> None:
    wide = opened(family.write(tmp_path, family.wide), dit_precision="bf16")
    check_batch_is_alone(family, wide)
    wide.shut()


@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": "sliding_tile_torch", "sliding_tile_window": [1, 1, 1]},
        {"attention_backend": "block_sparse_torch", "attention_sparsity": 0.5},
    ],
    ids=lambda options: str(options["attention_backend"]),
)
def test_mixed_batch_is_bit_identical_under_sparse_attention(
    family: Family, repository: Path, engine: LocalEngine, options: dict[str, object]
) -> None:
    """Sizes of several tiles, ragged ones among them; that tiles are skipped shows in the pictures."""
    larger = dataclasses.replace(family, sizes=((160, 128), (128, 80), (64, 144)))
    sparse = opened(repository, **options)
    check_batch_is_alone(larger, sparse)
    asked = mixed(larger)[0]
    assert collect(sparse, asked).outputs[0].frames != collect(engine, asked).outputs[0].frames
    sparse.shut()


def check_batch_is_alone(family: Family, engine: LocalEngine) -> None:
    alone = [collect(engine, asked) for asked in mixed(family)]
    together = run_staggered(engine, mixed(family))
    for one, other in zip(alone, together, strict=True):
        assert [o.frames.data for o in one.outputs] == [o.frames.data for o in other.outputs]
    assert largest_batch(engine) > 1, "nothing was ever packed, so nothing was tested"


def run_staggered(engine: LocalEngine, requests: list[Request]) -> list[Done]:
    """Submit the next request whenever the one before has taken a denoising step, so that they join mid-flight."""
    results: dict[str, Done] = {}
    over = threading.Event()
    waiting = list(requests)
    lock = threading.Lock()

    def submit_next() -> None:
        with lock:
            following = waiting.pop(0) if waiting else None
        if following is not None:
            threading.Thread(target=engine.submit, args=(following, sink)).start()

    started: set[str] = set()

    def sink(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise" and event.request_id not in started:
            started.add(event.request_id)
            submit_next()
        if isinstance(event, Done | Failed):
            assert isinstance(event, Done), event
            results[event.request_id] = event
            if len(results) == len(requests):
                over.set()

    submit_next()
    assert over.wait(60)
    return [results[asked.id] for asked in requests]


@pytest.mark.parametrize(
    "spread", [{}, {"enable_cfg_parallel": True}, {"ulysses_degree": 2}], ids=["samples", "branches", "heads"]
)
def test_two_ranks_are_one(family: Family, engine: LocalEngine, repository: Path, spread: dict[str, object]) -> None:
    alone = [collect(engine, asked) for asked in mixed(family)]
    for one, other in zip(alone, on_ranks(2, family, repository, **spread), strict=True):
        assert [o.frames.data for o in one.outputs] == [o.frames.data for o in other.outputs]


@pytest.mark.parametrize("ulysses", [1, 2], ids=["alone", "with heads"])
def test_a_ring_makes_the_same_but_for_rounding(family: Family, engine: LocalEngine, repository: Path, ulysses: int) -> None:
    alone = [collect(engine, asked) for asked in mixed(family)]
    around = on_ranks(2 * ulysses, family, repository, ring_degree=2, ulysses_degree=ulysses)
    for one, other in zip(alone, around, strict=True):
        for here, there in zip(one.outputs, other.outputs, strict=True):
            pixels = [np.frombuffer(output.frames.data, np.uint8).astype(int) for output in (here, there)]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.spec.name)
def test_every_variant_can_be_cut(variant: Family, tmp_path: Path) -> None:
    """Given tokens, channels beside them, two denoisers, prompts outside and inside of the sequence."""
    path = variant.write(tmp_path, variant.spec.tiny)
    asked = request(guidance_scale=3.5, width=48, max_sequence_length=512)
    if all(task.takes_image for task in variant.spec.tasks):
        asked = replace(asked, image=picture())
    whole = opened(path)
    expected = collect(whole, asked).outputs[0].frames
    whole.shut()
    cut = ranked_engine(2, model_path=str(path), sp_degree=2)
    cut.open()
    got = collect(cut, asked).outputs[0].frames
    cut.shut()
    assert got == expected


def on_ranks(count: int, family: Family, repository: Path, **options: object) -> list[Done]:
    """What so many ranks make of requests that come one after the other."""
    made = ranked_engine(count, model_path=str(repository), max_batch_tokens=4096, **options)
    made.open()
    try:
        return run_staggered(made, mixed(family))
    finally:
        made.shut()


def test_a_neighbour_that_leaves_changes_nobody(family: Family, engine: LocalEngine) -> None:
    first, second, third, *_ = mixed(family)
    alone = [collect(engine, asked) for asked in (first, third)]
    first, second, third, *_ = mixed(family)
    results: dict[str, Event] = {}
    over = threading.Semaphore(0)

    def sink(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise" and event.request_id == second.id:
            engine.cancel(second.id)
        if isinstance(event, Done | Failed):
            results[event.request_id] = event
            over.release()

    for asked in (first, second, third):
        engine.submit(asked, sink)
    for _ in range(3):
        assert over.acquire(timeout=60)
    assert isinstance(results[second.id], Failed)
    for asked, before in zip((first, third), alone, strict=True):
        after = results[asked.id]
        assert isinstance(after, Done)
        assert after.outputs[0].frames == before.outputs[0].frames


def test_outputs_of_one_request_are_seeds_that_count_up(engine: LocalEngine) -> None:
    three = collect(engine, request(num_outputs=3, seed=40))
    assert [o.seed for o in three.outputs] == [40, 41, 42]
    single = collect(engine, request(seed=42))
    assert three.outputs[2].frames == single.outputs[0].frames


# ------------------------------------------------------------------------------------------------------ abort, previews
def test_abort_takes_effect_before_the_next_step_and_frees_everything(engine: LocalEngine) -> None:
    asked = request(num_inference_steps=50)
    steps: list[int] = []
    ends: list[Event] = []
    over = threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise":
            steps.append(event.step)
            if event.step == 2:
                engine.cancel(asked.id)
        if isinstance(event, Done | Failed):
            ends.append(event)
            over.set()

    engine.submit(asked, sink)
    assert over.wait(60)
    assert isinstance(ends[0], Failed) and ends[0].code == "aborted"
    assert steps == [1, 2]
    settle(engine)
    gc.collect()
    kept = [
        thing for thing in gc.get_objects() if type(thing).__name__ in STATES and type(thing).__module__.startswith("stepwell.")
    ]
    assert not kept, "tensors of an aborted sample are still held"


def test_leaving_the_stream_aborts(engine: LocalEngine) -> None:
    stream = engine.stream(request(num_inference_steps=200))
    for event in stream:
        if isinstance(event, Progress) and event.stage == "denoise":
            break
    stream.close()  # type: ignore[attr-defined]
    settle(engine)


def test_previews_come_when_asked_and_change_nothing(family: Family, engine: LocalEngine) -> None:
    plain = collect(engine, request(num_inference_steps=6))
    asked = Request("a red circle", request(num_inference_steps=6).sampling, preview_every=2)
    events = list(engine.stream(asked))
    previews = [event for event in events if isinstance(event, Preview)]
    assert [p.step for p in previews] == [2, 4, 6]
    assert all(len(p.frames.data) == p.frames.count * p.frames.height * p.frames.width * 3 for p in previews)
    done = events[-1]
    assert isinstance(done, Done)
    assert done.outputs[0].frames == plain.outputs[0].frames


def test_every_event_in_order_and_timings_add_up(family: Family, engine: LocalEngine) -> None:
    decode = 2 if family.spec.tasks[0].makes_video else 1  # a video of five frames has two latent ones
    events = list(engine.stream(request(num_inference_steps=3)))
    assert [(e.stage, e.step, e.total) for e in events if isinstance(e, Progress)] == [
        ("encode_text", 0, 1),
        ("encode_text", 1, 1),
        ("prepare_latents", 1, 1),
        ("denoise", 1, 3),
        ("denoise", 2, 3),
        ("denoise", 3, 3),
        *(("decode", step + 1, decode) for step in range(decode)),
    ]
    done = events[-1]
    assert isinstance(done, Done)
    timings = done.outputs[0].timings_ms
    stages = sum(ms for name, ms in timings.items() if name != "total")
    assert 0 < stages <= timings["total"] * 1.01


def test_bf16_makes_the_same_move(family: Family, repository: Path) -> None:
    """What denoising changed, not the noise both start from: that alone would make any two results look alike."""
    asked = request(num_inference_steps=1, guidance_scale=1.0)  # time and guidance of 1000 are exact in bf16
    exact, rough = (
        worker_of(repository, threads=1, dit_precision=precision, text_encoder_precisions="fp32")
        for precision in ("fp32", "bf16")
    )
    start = exact._stages["prepare_latents"].latents.noise(
        complete(asked, exact.info), torch.Generator().manual_seed(5), torch.float32
    )  # type: ignore[attr-defined]
    moves = [final_latents(worker, asked).float() - start for worker in (exact, rough)]
    assert (moves[0] - moves[1]).norm() < 0.02 * moves[0].norm()


# --------------------------------------------------------------------------------------------------- offload ≡ resident
def test_layerwise_offload_changes_no_bit(family: Family, repository: Path) -> None:
    check_offload_is_resident(family, repository)


def test_layerwise_offload_changes_no_bit_where_kernels_depend_on_the_rows(family: Family, tmp_path: Path) -> None:
    check_offload_is_resident(family, family.write(tmp_path, family.wide), dit_precision="bf16")


def check_offload_is_resident(family: Family, path: Path, **options: object) -> None:
    options = {**options, "attention_backend": "torch_sdpa"}  # auto measures, and may choose another kernel the next time
    resident = opened(path, linear_backend="torch", **options)
    expected = [collect(resident, asked) for asked in mixed(family)]
    resident.shut()
    offloaded = opened(path, dit_layerwise_offload=True, **options)
    check_batch_is_alone(family, offloaded)
    got = [collect(offloaded, replace(asked, preview_every=2)) for asked in mixed(family)]
    for one, other in zip(expected, got, strict=True):
        assert [o.frames.data for o in one.outputs] == [o.frames.data for o in other.outputs]
    offloaded.shut()


def test_an_abort_leaves_nothing_fetched(repository: Path) -> None:
    engine = opened(repository, dit_layerwise_offload=True)
    assert engine._core is not None
    runner: Streamed = engine._core._worker._stages["denoise"].denoiser.blocks.runner.inner  # type: ignore[attr-defined]
    fetched: list[int] = []
    stream = engine.stream(request(num_inference_steps=200))
    for event in stream:
        if isinstance(event, Progress) and event.stage == "denoise":
            fetched.append(len(runner._rooms))
            if event.step == 3:
                break
    stream.close()  # type: ignore[attr-defined]
    settle(engine)
    assert min(fetched) > 0
    deadline = time.monotonic() + 5
    while runner._rooms:  # the worker counts no sample any more a moment before it lets go
        assert time.monotonic() < deadline, "blocks are still there"
        time.sleep(0.005)
    engine.shut()


def settle(engine: LocalEngine) -> None:
    """Wait until the engine says that nothing is left of any request."""
    deadline = time.monotonic() + 5
    while (now := stats(engine)) and (now.held_samples, now.running_samples, now.queued_samples, now.requests) != (0, 0, 0, 0):
        assert time.monotonic() < deadline, now
        time.sleep(0.005)


def largest_batch(engine: LocalEngine) -> int:
    """The most samples that took a denoising step together."""
    return max(size for (_, stage), sizes in stats(engine).batch_sizes.items() if stage == "denoise" for size in sizes)


def stats(engine: LocalEngine) -> StatsReply:
    assert engine._core is not None
    return engine._core.stats()

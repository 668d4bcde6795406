"""The Python API."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepwell import DiffGenerator
from stepwell.errors import EngineClosed, InvalidRequest, ModelNotFound, StepwellError, Unsupported
from stepwell.media.images import read_parameters
from stepwell.types import Event, Preview, Progress
from tests.engine.test_core import settle

QUICK = {"width": 32, "height": 48, "num_inference_steps": 2, "seed": 9}


def test_what_an_output_holds(tiny: DiffGenerator, tmp_path: Path) -> None:
    outputs = tiny.generate(
        prompt="a red circle",
        guidance_scale=0.0,
        num_outputs_per_prompt=2,
        output_path=tmp_path,
        **QUICK,  # type: ignore[arg-type]
    )
    assert [o.seed for o in outputs] == [9, 10]
    first = outputs[0]
    assert first.frames.shape == (1, 48, 32, 3) and first.frames.dtype == np.uint8
    assert first.image.size == (32, 48)
    assert first.path is not None and Image.open(first.path).tobytes() == first.image.tobytes()
    assert read_parameters(first.path)["seed"] == 9
    assert {"queued", "encode_text", "prepare_latents", "denoise", "decode", "total"} == set(first.timings)


def test_a_seed_is_a_picture(tiny: DiffGenerator) -> None:
    one, two, other = (tiny.generate("a star", **{**QUICK, "seed": seed})[0] for seed in (1, 1, 2))
    assert np.array_equal(one.frames, two.frames)
    assert not np.array_equal(one.frames, other.frames)


def test_several_prompts_run_together_and_come_back_in_order(tiny: DiffGenerator) -> None:
    prompts = ["a red circle", "two blue stars", "a green square"]
    together = tiny.generate(prompts, **QUICK)
    for prompt, output in zip(prompts, together, strict=True):
        assert output.parameters.prompt == prompt
        assert np.array_equal(tiny.generate(prompt, **QUICK)[0].frames, output.frames)


def test_events_and_previews(tiny: DiffGenerator) -> None:
    events: list[Event] = []
    tiny.generate("a star", on_event=events.append, preview_every=1, **QUICK)
    assert [e.step for e in events if isinstance(e, Preview)] == [1, 2]
    assert [(e.step, e.total) for e in events if isinstance(e, Progress) and e.stage == "denoise"] == [(1, 2), (2, 2)]


def test_an_exception_in_the_callback_aborts(tiny: DiffGenerator) -> None:
    class Enough(Exception): ...

    def stop(event: Event) -> None:
        if isinstance(event, Progress):
            raise Enough

    with pytest.raises(Enough):
        tiny.generate("a star", on_event=stop, **{**QUICK, "num_inference_steps": 500})
    settle(tiny._engine)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": 5}, "prompt = 5: must be a string"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 7]}, "prompt = 7"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x", "width": 100}, "width = 100: must be a multiple of 16; 96 or 112"),
        ({"prompt": "x", "width": "64"}, "width = '64': must be an integer"),
        ({"prompt": "x", "height": -16}, "height = -16"),
        ({"prompt": "x", "width": 8192, "height": 8192}, "pixels"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"prompt": "x", "num_inference_steps": True}, "num_inference_steps = True"),
        ({"prompt": "x", "seed": 2**63}, "seed"),
        ({"prompt": "x", "seed": 2**63 - 1, "num_outputs_per_prompt": 2}, "seed"),
        ({"prompt": "x", "num_outputs_per_prompt": 0}, "num_outputs_per_prompt = 0"),
        ({"prompt": "x", "guidance_scale": float("inf")}, "guidance_scale = inf"),
        ({"prompt": "x", "negative_prompt": 3}, "negative_prompt = 3"),
        ({"prompt": "x", "max_sequence_length": 513}, "between 1 and 512"),
        ({"prompt": "x", "num_steps": 3}, "did you mean"),
    ],
)
def test_bad_arguments(tiny: DiffGenerator, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        tiny.generate(**arguments)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_bad_options() -> None:
    with pytest.raises(ModelNotFound, match="no such folder"):
        DiffGenerator.from_pretrained("./nowhere")
    with pytest.raises(InvalidRequest, match="did you mean 'dit_precision'"):
        DiffGenerator.from_pretrained("stepwell/tiny-flux", dit_precison="fp32")
    with pytest.raises(InvalidRequest, match="dit_precision = 'fp8'"):
        DiffGenerator.from_pretrained("stepwell/tiny-flux", dit_precision="fp8")
    with pytest.raises(Unsupported, match="tp_size = 2: splits the weights of models of text only"):
        DiffGenerator.from_pretrained("stepwell/tiny-flux", tp_size=2)


def test_after_closing(flux_dev: Path) -> None:
    generator = DiffGenerator.from_pretrained(str(flux_dev), threads=1)
    generator.close()
    generator.close()
    with pytest.raises(EngineClosed):
        generator.generate("x")


@pytest.mark.parametrize("precisions", ["fp32", ["fp32"], ["bf16", "fp32"], "bf16,bf16"])
def test_precisions_of_text_encoders(flux_dev: Path, precisions: object) -> None:
    with DiffGenerator.from_pretrained(str(flux_dev), text_encoder_precisions=precisions, vae_precision="bf16", threads=1) as g:
        assert g.model.vae_precision == "bf16"
        assert g.generate("a star", **QUICK)[0].frames.std() > 0


def test_tiling_gives_nearly_the_same_picture(tiny: DiffGenerator) -> None:
    size = {"width": 128, "height": 128, "num_inference_steps": 2, "seed": 3}
    whole = tiny.generate("a blue square", **size)[0].frames.astype(int)  # type: ignore[arg-type]
    config = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
    with DiffGenerator.from_pretrained(
        "stepwell/tiny-flux", vae_tiling=True, vae_slicing=True, vae_config=config, threads=1
    ) as g:
        tiled = g.generate("a blue square", **size)[0].frames.astype(int)  # type: ignore[arg-type]
    difference = np.abs(whole - tiled)
    assert difference.max() > 0, "tiling did nothing"
    assert difference.mean() < 8


def test_another_vae(flux_dev: Path, tmp_path: Path) -> None:
    from tests.support.families import FAMILIES

    other = FAMILIES[0].write(tmp_path, {})
    with DiffGenerator.from_pretrained(str(flux_dev), vae_path=str(other / "vae"), threads=1) as g:
        assert g.generate("a star", **QUICK)
    with pytest.raises(StepwellError, match="latent channels"):
        DiffGenerator.from_pretrained(str(flux_dev), vae_path="stepwell/tiny-flux")


def test_made_up_names_never_replace_a_picture(tiny: DiffGenerator, tmp_path: Path) -> None:
    outputs = tiny.generate(["圆", "星", "圆"], output_path=tmp_path, **QUICK)  # type: ignore[arg-type]
    assert [o.path.name for o in outputs if o.path] == ["圆-9.png", "星-9.png", "圆-9-2.png"]


def test_the_prompt_cache_keeps_lengths_apart_and_is_bounded() -> None:
    import torch

    from stepwell.guidance import TRUE_CFG
    from stepwell.stages.base import State
    from stepwell.stages.text import Conditioning, EncodeText
    from stepwell.types import Request, SamplingParams

    calls: list[tuple[str, int]] = []

    def encoder(prompt: str, length: int) -> Conditioning:
        calls.append((prompt, length))
        return Conditioning(torch.zeros(length, 4), torch.zeros(4))

    stage = EncodeText(encoder, TRUE_CFG, cache_bytes=3 * (8 * 4 * 4 + 16))

    def encode(prompt: str, length: int) -> int:
        sampling = SamplingParams(max_sequence_length=length, true_cfg_scale=1.0)
        state = State(Request(prompt, sampling), 0, 0)
        stage.run([(state, 0)])
        return int(state.conditioning[0].states.shape[0])

    assert [encode("a", 8), encode("a", 4), encode("a", 8)] == [8, 4, 8]
    assert calls == [("a", 8), ("a", 4)]
    for prompt in "bcd":
        encode(prompt, 8)
    assert stage._held_bytes <= stage.cache_bytes
    encode("a", 8)
    assert calls[-1] == ("a", 8), "the oldest entry was never dropped"


def test_two_generators_side_by_side(tiny: DiffGenerator, flux_dev: Path) -> None:
    before = tiny.generate("a star", **QUICK)[0].frames
    with DiffGenerator.from_pretrained(str(flux_dev), threads=1) as other:
        assert other.generate("a star", **QUICK)[0].frames.shape == before.shape
        assert np.array_equal(tiny.generate("a star", **QUICK)[0].frames, before)

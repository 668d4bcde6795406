"""HunyuanVideo from a picture, which lies beside the latents or is their first frame: what it promises as every model does, what
it reads of prompt and picture, its doors, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from transformers import PreTrainedTokenizerFast

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.errors import InvalidRequest, Unsupported, WeightsError
from stepwell.models import hunyuan_video
from stepwell.stages.text import HunyuanPictureEncoder
from stepwell.types import Done, Preview, replace
from tests.cli.test_generate import fails
from tests.cli.test_video import held
from tests.contract import test_resume
from tests.contract.test_contract import (
    check_batch_is_alone,
    check_offload_is_resident,
    collect,
    from_picture,
    mixed,
    opened,
    picture,
)
from tests.contract.test_passes import CACHES, check_company, with_cache
from tests.support.driving import final_latents, worker_of
from tests.support.families import VARIANTS, Family
from tests.support.repositories import llama_3_tokenizer
from tests.support.sdk import Sdk, details, drawn, made
from tests.support.server import serving
from tests.video.test_hunyuan import changed

REPLACE, CONCAT = hunyuan_video.I2V, hunyuan_video.I2V_33_DISTILLED


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {each.spec.name: each.write(tmp_path_factory.mktemp(each.spec.name), {}) for each in both()}


def both() -> list[Family]:
    return [variant for variant in VARIANTS if variant.spec in (REPLACE, CONCAT)]


@pytest.fixture(params=both(), ids=lambda each: each.spec.name)
def kind(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture
def path(kind: Family, repositories: dict[str, Path]) -> Path:
    return repositories[kind.spec.name]


# ----------------------------------------------------------------------------------------------- what every model promises
def test_mixed_batch_is_bit_identical_to_each_alone(kind: Family, path: Path) -> None:
    engine = opened(path)
    check_batch_is_alone(kind, engine)
    engine.shut()


def test_mixed_batch_is_bit_identical_where_kernels_depend_on_the_rows(kind: Family, tmp_path: Path) -> None:
    wide = opened(kind.write(tmp_path, kind.wide), dit_precision="bf16")
    check_batch_is_alone(kind, wide)
    wide.shut()


def test_caches_of_all_kinds_in_one_batch(kind: Family, path: Path) -> None:
    engine = opened(path)
    check_company(engine, [with_cache(each, cache) for each, cache in zip(mixed(kind), CACHES, strict=True)])
    engine.shut()


def test_layerwise_offload_changes_no_bit(kind: Family, path: Path) -> None:
    check_offload_is_resident(kind, path)


def test_saved_mid_denoise_and_resumed_is_uninterrupted(kind: Family, path: Path, tmp_path: Path) -> None:
    test_resume.test_saved_mid_denoise_and_resumed_is_uninterrupted(kind, path, tmp_path, "dbcache")


def test_key_map_covers_the_checkpoint_both_ways(kind: Family) -> None:
    for changes in kind.odd_configs:
        config = {**kind.spec.tiny, **changes}
        with torch.device("meta"):
            ours = {name for name, _ in kind.spec.build_denoiser(config).named_parameters()}
        key_map = kind.spec.key_map(config)
        used = [key for keys in key_map.values() for key in keys]
        assert set(key_map) == ours and len(used) == len(set(used)) and set(used) == kind.checkpoint_keys(config)


# ------------------------------------------------------------------------------------------------------------ the reference
@pytest.mark.parametrize("frames", [1, 21])
def test_the_shortest_video_and_one_of_several_tiles(kind: Family, path: Path, frames: int) -> None:
    """The reference decodes four frames more where the picture lies beside the latents, and drops them."""
    asked = from_picture(num_frames=frames, width=16, height=48)
    reference = kind.reference(path, asked)
    assert (final_latents(worker_of(path, threads=1), asked) - reference.latents).abs().max() <= 1e-4
    engine = opened(path)
    frame = collect(engine, asked).outputs[0].frames
    engine.shut()
    pixels = np.frombuffer(frame.data, np.uint8).reshape(frame.count, frame.height, frame.width, 3)
    assert frame.count == frames and pixels.shape == reference.pixels.shape
    assert np.abs(pixels.astype(int) - reference.pixels.astype(int)).max() <= 1


def test_previews_show_the_frames_that_are_seen(kind: Family, path: Path) -> None:
    engine = opened(path)
    events = list(engine.stream(replace(from_picture(num_inference_steps=4), preview_every=2)))
    engine.shut()
    assert isinstance(events[-1], Done)
    assert [event.frames.count for event in events if isinstance(event, Preview)] == [2, 2]  # five frames are two of latents


# ------------------------------------------------------------------------------------------------------- prompt and picture
@torch.no_grad()
def test_states_are_those_of_the_picture_and_of_the_prompts_own_tokens(
    repositories: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipe, encode = pipe_and_encoder(repositories[REPLACE.name], every=4)
    image = Image.frombytes("RGB", (50, 40), picture().data)
    black = Image.new("RGB", (32, 16))
    words = len(pipe.tokenizer("a red circle", add_special_tokens=False).input_ids)
    cases = [("", 8), ("a red circle", 64), ("many words " * 20, 16), ("many words " * 20, 3)]
    cases += [("a red circle", words + tail) for tail in range(7)]  # cut anywhere in what follows the prompt, and nowhere
    for prompt, length in cases:
        for seen, shown, every in ((picture(), image, 4), (None, black, 2)):
            states, pooled, mask = pipe.encode_prompt(shown, prompt, max_sequence_length=length, image_embed_interleave=every)
            caplog.clear()
            made = encode(prompt, length, seen)
            own = mask[0].bool()
            assert len(made.states) == own.sum() >= 576 // every
            assert torch.allclose(made.states, states[0, own], atol=1e-5)
            assert torch.equal(made.pooled, pooled[0])
            tokens = len(pipe.tokenizer(prompt, add_special_tokens=False).input_ids) + 5
            assert (f"sees the first {length} of them only" in caplog.text) == (tokens > length)


def pipe_and_encoder(path: Path, every: int, **changes: Any) -> tuple[Any, HunyuanPictureEncoder]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path / "tokenizer")
    pipe = HunyuanVideoImageToVideoPipeline.from_pretrained(path, tokenizer=tokenizer)
    return pipe, HunyuanPictureEncoder({**pipe.components, **changes}, DEFAULT_PROMPT_TEMPLATE, every)


def test_a_prompt_is_encoded_once_for_each_picture(repositories: dict[str, Path]) -> None:
    worker = worker_of(repositories[REPLACE.name], threads=1)
    stage: Any = worker._stages["encode_text"]
    encoded: list[object] = []
    encode = stage.sees

    def counting(prompt: str, length: int, seen: Any = None) -> Any:
        encoded.append(seen)
        return encode(prompt, length, seen)

    stage.sees = counting
    asked = from_picture(true_cfg_scale=2.0, negative_prompt="a red circle")
    for _ in range(2):
        final_latents(worker, asked)
    assert encoded == [asked.image, None]
    other = replace(picture(), data=picture().data[::-1])
    final_latents(worker, replace(asked, image=other))
    assert encoded[2:] == [other]


# -------------------------------------------------------------------------------------------------------------- its doors
def test_command_line(path: Path, kind: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((60, 30)).convert("RGB").save("first.png")
    command = ["generate", "--model-path", str(path), "--prompt", "a star", "--seed", "3", "--num-inference-steps", "2"]
    assert main([*command, "--image-path", "first.png", "--num-frames", "9", "--output-file-name", "a.mp4"]) == 0
    assert held(Path("outputs/a.mp4")) == (9, (32, 16), 8.0)  # the picture's shape, no larger than the model's own size
    again = ["generate", "--from", "outputs/a.mp4", "--image-path", "first.png", "--output-file-name", "b.mp4"]
    assert main(again) == 0
    assert Path("outputs/b.mp4").read_bytes() == Path("outputs/a.mp4").read_bytes()


def test_server(path: Path) -> None:
    engine = opened(path)
    with serving(engine) as url:
        sdk = Sdk("sync", f"{url}/v1")
        body = {"seed": 6, "num_inference_steps": 2}
        done = made(sdk, prompt="a star", seconds="1", input_reference=drawn(64, 32), extra_body=body)
        assert (done.status, done.size, done.num_frames) == ("completed", "32x16", 9)  # type: ignore[attr-defined]
        assert details(sdk("videos.download_content", done.id).content) == (9, (32, 16), 8.0)
        with pytest.raises(openai.BadRequestError, match="starts from a picture; give one"):
            sdk("videos.create", prompt="a star")
        failed = made(sdk, prompt="an <image> of a star", input_reference=drawn(), extra_body=body)
        assert (
            failed.status == "failed"
            and failed.error is not None
            and "'<image>', which stands for the pic" in failed.error.message
        )
    engine.shut()


def test_python(path: Path) -> None:
    with DiffGenerator.from_pretrained(str(path), threads=1) as generator:
        image = Image.linear_gradient("L").convert("RGB")
        (clip,) = generator.generate("a star", image=image, num_inference_steps=1, width=48, height=16, num_frames=5, seed=1)
        assert clip.frames.shape == (5, 16, 48, 3)
        with pytest.raises(InvalidRequest, match="starts from a picture; give one") as refused:
            generator.generate("a star")
        assert refused.value.param == "image"
        with pytest.raises(
            InvalidRequest, match="prompt: holds '<image>', which stands for the picture; leave it out"
        ) as refused:
            generator.generate("a star <image>", image=image, num_inference_steps=1)
        assert refused.value.param == "prompt"
        with pytest.raises(InvalidRequest, match="num_frames = 6: must be a multiple of 4 and one more; 5 or 9 would do"):
            generator.generate("a star", image=image, num_frames=6)


# ------------------------------------------------------------------------------------------------------------- its kinds
def test_what_tells_its_kinds_apart(tmp_path: Path) -> None:
    found = {}
    for spec in (hunyuan_video.I2V, hunyuan_video.I2V_UNDISTILLED, hunyuan_video.I2V_33, hunyuan_video.I2V_33_DISTILLED):
        family = next(variant for variant in VARIANTS if variant.spec is spec)
        with DiffGenerator.from_pretrained(str(family.write(tmp_path / spec.name, {})), threads=1) as generator:
            defaults = replace(generator.model.defaults, cache=None)
            found[spec.name] = (generator.model.has_guidance, defaults.num_inference_steps, generator.model.pipeline_class)
    assert found == {
        "hunyuanvideo-i2v": (True, 50, "HunyuanVideoImageToVideoPipeline"),
        "hunyuanvideo-i2v-without-guidance": (False, 50, "HunyuanVideoImageToVideoPipeline"),
        "hunyuanvideo-i2v-33ch": (False, 50, "HunyuanVideoImageToVideoPipeline"),
        "hunyuanvideo-i2v-33ch-with-guidance": (True, 50, "HunyuanVideoImageToVideoPipeline"),
    }


@pytest.mark.parametrize(
    ("name", "changes", "param", "words"),
    [
        (
            REPLACE.name,
            {"image_condition_type": None},
            "image_condition_type",
            "where this kind of pipeline takes 'token_replace'",
        ),
        (REPLACE.name, {"image_condition_type": "both"}, "image_condition_type", "'both' is not supported"),
        (CONCAT.name, {"in_channels": 8}, "in_channels", "in_channels = 8 is not supported"),
        (CONCAT.name, {"out_channels": 3}, "out_channels", "out_channels = 3 is not supported"),
        (CONCAT.name, {"image_condition_type": "token_replace"}, "out_channels", "out_channels = 4 is not supported"),
    ],
)
def test_a_config_it_does_not_know_is_refused(
    repositories: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(WeightsError, match=words) as refused:
        DiffGenerator.from_pretrained(str(changed(repositories[name], tmp_path / "it", "transformer", **changes)), threads=1)
    assert refused.value.param == param


def test_without_the_vaes_encoder_nothing_is_left(path: Path) -> None:
    with pytest.raises(Unsupported, match="load_encoder = false, but hunyuanvideo-i2v.* always starts from a picture"):
        worker_of(path, vae_config={"load_encoder": False})


def test_a_text_encoder_that_sees_nothing_is_refused(
    repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(repositories[REPLACE.name], tmp_path / "it")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["transformers", "LlamaModel"]}))
    said = fails(["generate", "--model-path", str(copy), "--prompt", "x"], capsys)
    assert "text_encoder is a 'LlamaModel'; this model takes LlavaForConditionalGeneration" in said


def test_a_tokenizer_or_an_encoder_of_another_kind_is_refused(repositories: dict[str, Path]) -> None:
    path = repositories[REPLACE.name]
    with pytest.raises(WeightsError, match="template, where 108 are right, with the picture's .5 in .* at 5") as refused:
        pipe_and_encoder(path, every=4, tokenizer=llama_3_tokenizer("nothing of it"))
    assert refused.value.param == "tokenizer"
    pipe, _ = pipe_and_encoder(path, every=4)
    pipe.text_encoder.config.vision_config.patch_size = 3
    with pytest.raises(WeightsError, match="48 pixels in patches of 3, where 576 patches are right") as refused:
        HunyuanPictureEncoder(pipe.components, DEFAULT_PROMPT_TEMPLATE, 4)
    assert refused.value.param == "text_encoder"


def test_strength_does_not_apply(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = worker_of(path, threads=1)
    plain = final_latents(worker, from_picture())
    assert torch.equal(final_latents(worker, from_picture(strength=0.5)), plain)
    assert "strength does not apply: a video's first picture is taken as it is" in caplog.text

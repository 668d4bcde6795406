"""HunyuanVideo and FastHunyuan: how a repository is recognised, what it reads of a prompt, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from transformers import AutoTokenizer, LlamaTokenizerFast

from stepwell import DiffGenerator
from stepwell.engine import memory
from stepwell.errors import InvalidRequest, WeightsError
from stepwell.models import hunyuan_video
from stepwell.models.parts import load_processor
from stepwell.stages.text import HunyuanTextEncoder
from stepwell.weights.repository import open_repository
from tests.contract.test_contract import check_batch_is_alone, check_offload_is_resident, collect, mixed, opened, request
from tests.contract.test_passes import CACHES, check_company, with_cache
from tests.support.families import VARIANTS
from tests.support.repositories import hunyuan_repository, llama_3_tokenizer

FAMILY = next(variant for variant in VARIANTS if variant.spec is hunyuan_video.T2V)


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILY.write(tmp_path_factory.mktemp("it"), {})


def changed(path: Path, to: Path, part: str, **changes: Any) -> Path:
    """A copy of a repository with other entries in a part's config."""
    shutil.copytree(path, to)
    file = next((to / part).glob("*config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return to


# ------------------------------------------------------------- what every model promises, as far as it is not cheaper elsewhere
def test_caches_of_all_kinds_in_one_batch(hunyuan: Path) -> None:
    engine = opened(hunyuan)
    check_company(engine, [with_cache(each, cache) for each, cache in zip(mixed(FAMILY), CACHES, strict=True)])
    engine.shut()


@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": "sliding_tile_torch", "sliding_tile_window": [1, 1, 1]},
        {"attention_backend": "block_sparse_torch", "attention_sparsity": 0.5},
    ],
    ids=lambda options: str(options["attention_backend"]),
)
def test_mixed_batch_is_bit_identical_under_sparse_attention(hunyuan: Path, options: dict[str, object]) -> None:
    larger = dataclasses.replace(FAMILY, sizes=((96, 160), (160, 80), (64, 144)))
    sparse, dense = opened(hunyuan, **options), opened(hunyuan)
    check_batch_is_alone(larger, sparse)
    asked = request(width=96, height=160)
    assert collect(sparse, asked).outputs[0].frames != collect(dense, asked).outputs[0].frames
    sparse.shut()
    dense.shut()


def test_layerwise_offload_changes_no_bit(hunyuan: Path) -> None:
    check_offload_is_resident(FAMILY, hunyuan)


def test_key_map_covers_the_checkpoint_both_ways() -> None:
    for config in FAMILY.odd_configs:
        config = {**FAMILY.spec.tiny, **config}
        with torch.device("meta"):
            ours = {name for name, _ in FAMILY.spec.build_denoiser(config).named_parameters()}
        key_map = FAMILY.spec.key_map(config)
        used = [key for keys in key_map.values() for key in keys]
        assert set(key_map) == ours and len(used) == len(set(used)) and set(used) == FAMILY.checkpoint_keys(config)


# -------------------------------------------------------------------------------------------------------------- its own
def test_its_name_tells_fast_hunyuan(hunyuan: Path, tmp_path: Path) -> None:
    fast = shutil.copytree(hunyuan, tmp_path / "FastHunyuan-diffusers")
    for path, steps, has_teacache in ((hunyuan, 50, True), (fast, 6, False)):
        with DiffGenerator.from_pretrained(str(path), threads=1) as g:
            assert (g.model.defaults.num_inference_steps, g.model.has_teacache) == (steps, has_teacache)


def test_guidance_of_a_checkpoint_without_it_does_not_apply(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = hunyuan_repository(tmp_path / "it", dict(hunyuan_video.UNDISTILLED.tiny))
    with DiffGenerator.from_pretrained(str(path), threads=1) as g, caplog.at_level(logging.WARNING, "stepwell"):
        g.generate("a star", num_inference_steps=1, guidance_scale=4.0)
    assert "guidance_scale does not apply" in caplog.text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"image_condition_type": "token_replace"}, "image_condition_type"),
        ({"patch_size_t": 2}, "patch_size_t"),
        ({"qk_norm": None}, "qk_norm"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"rope_axes_dim": [4, 4, 5]}, "rope_axes_dim"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"layers": 3}, "layers"),
    ],
)
def test_a_config_it_does_not_know_is_refused(hunyuan: Path, tmp_path: Path, changes: dict[str, Any], param: str) -> None:
    path = changed(hunyuan, tmp_path / "it", "transformer", **changes)
    with pytest.raises(WeightsError, match=next(iter(changes))) as refused:
        DiffGenerator.from_pretrained(str(path), threads=1)
    assert refused.value.param == param


def test_a_llama_3_tokenizer_is_taken_as_it_was_saved(hunyuan: Path) -> None:
    """Which the class that repositories name no longer does, under transformers 5."""
    loaded = load_processor(open_repository(str(hunyuan)), hunyuan_video.T2V.parts["tokenizer"])
    text = "a red circle & 123 stars"
    assert loaded(text).input_ids == llama_3_tokenizer()(text).input_ids
    assert loaded(text).input_ids == AutoTokenizer.from_pretrained(hunyuan / "tokenizer")(text).input_ids
    assert loaded(text).input_ids != LlamaTokenizerFast.from_pretrained(hunyuan / "tokenizer")(text).input_ids


@torch.no_grad()
def test_states_are_those_of_the_prompts_own_tokens(hunyuan: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = HunyuanVideoPipeline.from_pretrained(hunyuan, tokenizer=llama_3_tokenizer())
    template = pipe.encode_prompt.__defaults__[1]
    encode = HunyuanTextEncoder(pipe.tokenizer, pipe.text_encoder, pipe.tokenizer_2, pipe.text_encoder_2, **template)
    for prompt, length, is_cut in (("", 8, False), ("a red circle", 32, False), ("many words " * 20, 16, True)):
        states, pooled, mask = pipe.encode_prompt(prompt, max_sequence_length=length)
        caplog.clear()
        made = encode(prompt, length)
        own = mask[0].bool()
        assert len(made.states) == own.sum() and torch.allclose(made.states, states[0, own], atol=1e-5)
        assert torch.equal(made.pooled, pooled[0])
        assert (f"sees the first {length} of them only" in caplog.text) == is_cut


def test_a_tokenizer_of_another_kind_is_refused(hunyuan: Path) -> None:
    pipe = HunyuanVideoPipeline.from_pretrained(hunyuan, tokenizer=llama_3_tokenizer())
    with pytest.raises(WeightsError, match="tokenizer: makes 2 tokens of the prompt's template, where 96 are right"):
        HunyuanTextEncoder(pipe.tokenizer, None, None, None, template="{} video", crop_start=95)


def test_frames_that_fit_without_tiles(hunyuan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 200 * 2**20)
    with DiffGenerator.from_pretrained(str(hunyuan), threads=1) as g:
        assert 64 * 64 < g.model.limits.max_pixels < 256 * 256
        with pytest.raises(InvalidRequest, match="fit into the memory that is free here without vae_tiling"):
            g.generate("a star", width=256, height=256)
    with DiffGenerator.from_pretrained(str(hunyuan), threads=1, vae_tiling=True) as g:
        assert g.model.limits.max_pixels > 1280 * 720

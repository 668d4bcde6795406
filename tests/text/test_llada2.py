"""LLaDA2 against an independent dense reference, and against itself: however a text is cut into steps, the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from stepwell.cache.pages import PagePool, chained
from stepwell.engine.build_text import keep_bits, row_bound
from stepwell.errors import StepwellError
from stepwell.models import llada2
from stepwell.models.block_causal import BlockCausal
from stepwell.ops.spans import Span
from stepwell.weights.reader import Safetensors
from tests.support.llada2 import TINY, dense_logits, random_tensors, write_model

SIZE = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "one group, two shared experts": {"n_group": 1, "topk_group": 1, "num_shared_experts": 2, "num_experts_per_tok": 3},
    "no shared expert, all rotary": {"num_shared_experts": 0, "partial_rotary_factor": 1.0, "rotary_dim": 16},
    "all dense, normed head": {"first_k_dense_replace": 3, "norm_head": True},
    "equal heads": {"num_key_value_heads": 4, "first_k_dense_replace": 0},
}


def loaded(
    path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> BlockCausal:
    write_model(path, config, tensors)
    return llada2.load(llada2.read_config(config), Safetensors(path), dtype, "cpu")


@pytest.fixture(scope="module", params=["fp32", "bf16", "wide bf16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BlockCausal:
    """As the engine runs it. Wide layers are those whose sums depend on the number of rows on some CPUs."""
    dtype = torch.float32 if request.param == "fp32" else torch.bfloat16
    config = TINY if "wide" not in request.param else {**TINY, "hidden_size": 1024, "intermediate_size": 2048}
    made = loaded(tmp_path_factory.mktemp("llada2"), config, random_tensors(config), dtype)
    keep_bits(made, row_bound(made))
    return made


def ids_of(blocks: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(TINY["vocab_size"]), k=blocks * SIZE)


class Runner:
    """Keeps texts as the engine's stage does."""

    def __init__(self, model: BlockCausal, pages: int = 64):
        self.model = model
        self.pool: PagePool = model.pool(pages, SIZE)

    def step(self, *texts: tuple[list[int], int]) -> list[torch.Tensor]:
        """(ids of a whole text, how many of its blocks to compute) each: keeps all of these, gives the last block's logits."""
        spans, keys = [], []
        for ids, new in texts:
            chain = [b""]
            for start in range(0, len(ids), SIZE):
                chain.append(chained(chain[-1], ids[start : start + SIZE]))
            past = len(ids) // SIZE - new
            pages = self.pool.find(chain[1 : past + 1])
            assert len(pages) == past
            spans.append(Span(ids[past * SIZE :], pages, range((new - 1) * SIZE, new * SIZE)))
            keys.append(chain[past + 1 :])
        logits, made = self.model(self.model.pack(spans, SIZE), self.pool)
        row = 0
        for own in keys:
            for key in own:
                self.pool.write(key, slice(row, row + SIZE), made)
                row += SIZE
        return list(logits.split(SIZE))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("has_norms", [True, False])
def test_logits_are_the_dense_reference(tmp_path: Path, changes: dict[str, Any], has_norms: bool) -> None:
    config = {**TINY, **changes}
    tensors = random_tensors(config, has_norms=has_norms)
    model = loaded(tmp_path, config, tensors)
    ids = ids_of(4)
    expected = dense_logits(tensors, config, ids, SIZE)
    spans = [Span(ids, (), range(len(ids)))]
    logits, _ = model(model.pack(spans, SIZE), model.pool(1, SIZE))
    assert (logits.double() - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


def test_however_a_text_is_cut_into_steps_the_bits_are_the_same(model: BlockCausal) -> None:
    ids = ids_of(6)
    whole = Runner(model).step((ids, 6))[0]
    one_by_one = Runner(model)
    for end in range(1, 6):
        one_by_one.step((ids[: end * SIZE], 1))
    chunks = Runner(model)
    chunks.step((ids[: 3 * SIZE], 3))
    chunks.step((ids[: 4 * SIZE], 1))
    assert torch.equal(one_by_one.step((ids, 1))[0], whole)  # pages ≡ none, one-shot prefill ≡ block by block
    assert torch.equal(chunks.step((ids, 2))[0], whole)  # a commit fused with the next block ≡ separate


def test_a_text_in_company_has_the_bits_it_has_alone(model: BlockCausal) -> None:
    texts = [(ids_of(blocks, seed), new) for seed, (blocks, new) in enumerate([(1, 1), (5, 1), (5, 2), (3, 3), (2, 1), (5, 1)])]
    alone = []
    for ids, new in texts:
        runner = Runner(model)
        if len(ids) // SIZE > new:
            runner.step((ids[: len(ids) - new * SIZE], len(ids) // SIZE - new))
        alone.append(runner.step((ids, new))[0])
    together = Runner(model)
    for ids, new in texts:
        if len(ids) // SIZE > new:
            together.step((ids[: len(ids) - new * SIZE], len(ids) // SIZE - new))
    for own, other in zip(alone, together.step(*texts), strict=True):
        assert torch.equal(own, other)


def test_logits_are_made_for_the_rows_asked_for_only(model: BlockCausal) -> None:
    ids = ids_of(2)
    pool = model.pool(1, SIZE)
    whole, _ = model(model.pack([Span(ids, (), range(2 * SIZE))], SIZE), pool)
    some, _ = model(model.pack([Span(ids, (), (9, 14)), Span(ids, (), ()), Span(ids, (), (8,))], SIZE), pool)
    assert torch.equal(some, whole[[9, 14, 8]])


def prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for i in range(1, TINY["num_hidden_layers"]):
        for kind in ("gate", "up", "down"):
            prefix = f"model.layers.{i}.mlp.experts"
            each = [tensors[f"{prefix}.{e}.{kind}_proj.weight"] for e in range(TINY["num_experts"])]
            made[f"{prefix}.{kind}_proj"] = torch.stack(each)
    return made


@pytest.mark.parametrize("rename", [prefixed, stacked, lambda tensors: prefixed(stacked(tensors))])
def test_every_variant_of_the_names_is_the_same_model(tmp_path: Path, rename: Any) -> None:
    extra = {"v_head.weight": torch.ones(3), "model.rotary_emb.inv_freq": torch.ones(4)}
    other = loaded(tmp_path, TINY, {**rename(random_tensors(TINY)), **extra})
    own = dict(loaded(tmp_path / "own", TINY, random_tensors(TINY)).named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in other.named_parameters())


def test_tied_embeddings_are_the_head(tmp_path: Path) -> None:
    config = {**TINY, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    del tensors["lm_head.weight"]
    model = loaded(tmp_path, config, tensors)
    ids = ids_of(2)
    logits, _ = model(model.pack([Span(ids, (), range(len(ids)))], SIZE), model.pool(1, SIZE))
    expected = dense_logits(tensors, config, ids, SIZE)
    assert (logits.double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_router_keeps_float32(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    write_model(tmp_path, TINY, tensors)
    model = llada2.load(llada2.read_config(TINY), Safetensors(tmp_path), torch.bfloat16, "cpu")
    bias = dict(model.named_parameters())["blocks.1.mlp.router.bias"]
    assert torch.equal(bias, tensors["model.layers.1.mlp.gate.expert_bias"])
    assert model.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_experts": 0}, "num_experts"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_qkv_bias": True}, "use_qkv_bias"),
        ({"expert_capacity": 48}, "expert_capacity"),
        ({"n_group": 3}, "n_group"),
        ({"rotary_dim": 6}, "partial_rotary_factor"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
    ],
)
def test_a_config_that_is_wrong_is_refused_by_name(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(StepwellError, match=word):
        llada2.read_config({**TINY, **changes})
    without = {key: value for key, value in TINY.items() if key != "rope_theta"}
    with pytest.raises(StepwellError, match="rope_theta"):
        llada2.read_config(without)


def test_stacked_experts_the_other_way_round_are_refused(tmp_path: Path) -> None:
    tensors = stacked(random_tensors(TINY))
    name = "model.layers.1.mlp.experts.up_proj"
    tensors[name] = tensors[name].transpose(1, 2)
    with pytest.raises(StepwellError, match="up_proj"):
        loaded(tmp_path, TINY, tensors)


def test_the_page_used_longest_ago_makes_room(model: BlockCausal) -> None:
    runner = Runner(model, pages=3)
    old, new = ids_of(2, 1), ids_of(2, 2)
    runner.step((old, 2))
    runner.step((new, 2))
    chain = [chained(b"", old[:SIZE])]
    assert runner.pool.held == 3
    assert runner.pool.find(chain) == []
    assert len(runner.pool.find([chained(b"", new[:SIZE])])) == 1

"""SDAR against transformers' Qwen3, dense and with experts, under an explicit block-causal mask; and through the Python API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from stepwell import DiffGenerator
from stepwell.errors import StepwellError
from stepwell.models import sdar
from stepwell.ops.spans import Span
from stepwell.weights.reader import Safetensors
from tests.support.llada2 import write_model, write_tokenizer

SIZE = 4
TINY: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True, "decoder_sparse_step": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, tied": {"tie_word_embeddings": True, "num_key_value_heads": 6},
    "experts": MOE,
    "experts, weights as they are": {**MOE, "norm_topk_prob": False, "num_experts_per_tok": 1},
}


def reference(changes: dict[str, Any]) -> tuple[dict[str, Any], torch.nn.Module]:
    """The config.json of a SDAR checkpoint, and the Qwen3 with its weights."""
    torch.manual_seed(0)
    config = {**TINY, **changes}
    kind, made = (Qwen3MoeForCausalLM, Qwen3MoeConfig) if "num_experts" in changes else (Qwen3ForCausalLM, Qwen3Config)
    model = kind(made(**config, attn_implementation="eager", initializer_range=0.2)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    name = "SDARMoeForCausalLM" if "num_experts" in changes else "SDARForCausalLM"
    return {**config, "architectures": [name], "model_type": "sdar", "mask_token_id": 1, "eos_token_id": 0}, model


def written(path: Path, config: dict[str, Any], model: torch.nn.Module) -> Path:
    """As the checkpoints are: experts one by one."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if config["tie_word_embeddings"] and name == "lm_head.weight":
            continue
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        stem, _, kind = name.rpartition(".")
        for expert, own in enumerate(tensor):
            if kind == "down_proj":
                tensors[f"{stem}.{expert}.down_proj.weight"] = own
            else:
                tensors[f"{stem}.{expert}.gate_proj.weight"], tensors[f"{stem}.{expert}.up_proj.weight"] = own.chunk(2)
    write_model(path, config, tensors)
    write_tokenizer(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_qwen3s_under_the_block_causal_mask(tmp_path: Path, changes: dict[str, Any]) -> None:
    config, theirs = reference(changes)
    path = written(tmp_path, config, theirs)
    model = sdar.load(sdar.read_config(config), Safetensors(path), torch.float32, "cpu")
    ids = torch.randint(2, TINY["vocab_size"], (6 * SIZE,)).tolist()
    block = torch.arange(len(ids)) // SIZE
    mask = torch.where(block[:, None] >= block[None], 0.0, float("-inf"))[None, None]
    expected = theirs(torch.tensor([ids]), attention_mask=mask).logits[0]
    logits, _ = model(model.pack([Span(ids, (), range(len(ids)))], SIZE), model.pool(1, SIZE))
    assert (logits - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "experts"])
def test_it_generates_by_blocks_of_four(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = written(tmp_path, *reference(changes))
    with DiffGenerator.from_pretrained(path, threads=1) as generator:
        texts = [generator.generate("ab cd", raw=True, max_tokens=14, seed=3, ignore_eos=True)[0] for _ in range(2)]
    assert texts[0].usage.completion_tokens == 14
    assert 4 <= texts[0].usage.forwards <= 21  # a block takes one to four refinements, and the last may be cut off
    assert texts[0].text == texts[1].text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_config_that_is_wrong_is_refused_by_name(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(StepwellError, match=word):
        sdar.read_config({**TINY, "architectures": ["SDARForCausalLM"], **changes})

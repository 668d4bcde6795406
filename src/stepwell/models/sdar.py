"""SDAR: Qwen3, dense or with experts, trained on to fill blocks of a few tokens; its layers are those of `models.block_causal`.

Reference: the checkpoints' `modeling_sdar.py` and `modeling_sdar_moe.py` (Qwen3's layers under a block-causal mask; a position
predicts its own token), S. Cheng et al. 2025, "SDAR", arXiv 2510.06303.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepwell.errors import Unsupported, WeightsError
from stepwell.models.block_causal import BlockCausal, TextConfig, filled, unfilled
from stepwell.models.spec import KeyMap
from stepwell.parallel.team import ALONE, Team
from stepwell.weights.reader import Source

ARCHITECTURES = ("SDARForCausalLM", "SDARMoeForCausalLM")
BLOCK = 4
HUB_IDS = tuple(f"JetLM/SDAR-{size}-Chat" for size in ("1.7B", "4B", "8B", "30B-A3B"))
# what this version computes; a checkpoint that says otherwise is refused
_ONLY: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "rope_scaling": (None, {}),
    "use_sliding_window": (False,),
}
_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)


def read_config(config: Mapping[str, Any]) -> TextConfig:
    """config.json in LLaDA2's terms: no groups, no shared expert, no bias, and all channels turn. Raises WeightsError or
    Unsupported, naming the entry."""
    for key, allowed in _ONLY.items():
        if key in config and config[key] not in allowed:
            raise Unsupported(f"config.json: {key} = {config[key]!r}: this version runs {allowed[0]!r} only", param=key)
    made = {key: config[key] for key in _SAME if key in config}
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise Unsupported(
            f"config.json: rope_parameters = {rope!r}: this version runs rope_type default only", param="rope_parameters"
        )
    theta = config.get("rope_theta", rope.get("rope_theta"))
    made |= {"partial_rotary_factor": 1.0, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "num_shared_experts": 0}
    made |= {"rope_theta": theta} if theta is not None else {}
    if "SDARMoeForCausalLM" in config.get("architectures", ()):
        needed = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        missing = [key for key in needed if key not in config]
        if missing:
            raise WeightsError(f"config.json: {missing[0]} is missing", param=missing[0])
        made |= {key: config[key] for key in needed[:3]} | {"first_k_dense_replace": 0}
        made |= {"intermediate_size": config["moe_intermediate_size"], "has_unit_weights": config["norm_topk_prob"]}
        return TextConfig.of({**made, "score_function": "softmax"})
    made |= {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 1}
    made |= {"first_k_dense_replace": config.get("num_hidden_layers", 0)}
    made |= {"intermediate_size": config["intermediate_size"]} if "intermediate_size" in config else {}
    return TextConfig.of(made)


def key_map(config: TextConfig, names: set[str]) -> KeyMap:
    """Our parameters and the tensors they are made of, given which names there are."""
    made: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("model.embed_tokens.weight",),
        "norm.weight": ("model.norm.weight",),
    }
    if "lm_head.weight" in names or not config.tie_word_embeddings:
        made["head.weight"] = ("lm_head.weight",)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        made[f"{ours}.norm.weight"] = (f"{theirs}.input_layernorm.weight",)
        made[f"{ours}.mlp_norm.weight"] = (f"{theirs}.post_attention_layernorm.weight",)
        made[f"{ours}.attention.qkv.weight"] = tuple(f"{theirs}.self_attn.{kind}_proj.weight" for kind in "qkv")
        made[f"{ours}.attention.out.weight"] = (f"{theirs}.self_attn.o_proj.weight",)
        if has_norms(names):
            made[f"{ours}.attention.query_norm.weight"] = (f"{theirs}.self_attn.q_norm.weight",)
            made[f"{ours}.attention.key_norm.weight"] = (f"{theirs}.self_attn.k_norm.weight",)
        if i < config.first_k_dense_replace:
            made |= {f"{ours}.mlp.{kind}.weight": (f"{theirs}.mlp.{kind}_proj.weight",) for kind in ("gate", "up", "down")}
            continue
        made[f"{ours}.mlp.router.scores.weight"] = (f"{theirs}.mlp.gate.weight",)
        for kind in ("gate", "up", "down"):
            each = tuple(f"{theirs}.mlp.experts.{e}.{kind}_proj.weight" for e in range(config.num_experts))
            made[f"{ours}.mlp.experts.{kind}"] = each
    return made


def has_norms(names: set[str]) -> bool:
    """Whether queries and keys are normed."""
    return any(name.endswith("self_attn.q_norm.weight") for name in names)


def outline(config: TextConfig, source: Source, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> BlockCausal:
    """What a team's rank has of the model, without weights, on the meta device."""
    return unfilled(config, dtype, has_norms=has_norms(source.names()), team=team)


def load(config: TextConfig, source: Source, dtype: torch.dtype, device: str, team: Team = ALONE) -> BlockCausal:
    """What a team's rank has of the model, in `dtype` but for its routers. Raises WeightsError where the weights do not fit."""
    names = source.names()
    return filled(config, source, key_map(config, names), (dtype, device), has_norms=has_norms(names), team=team)

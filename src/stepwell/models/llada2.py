"""LLaDA2: a block-diffusion language model, a mixture of experts under a block-causal mask (2.0 and 2.1, mini and flash).

Reference: SGLang `models/llada2.py`; the checkpoints' `modeling_llada2_moe.py`; the LLaDA2.0 and 2.1 reports. The layers are in
`models.block_causal`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import Unsupported, WeightsError
from stepwell.models.block_causal import BlockCausal, TextConfig, filled, unfilled
from stepwell.models.spec import KeyMap
from stepwell.parallel.team import ALONE, Team
from stepwell.weights.reader import Source

ARCHITECTURES = ("LLaDA2MoeModelLM",)
BLOCK = 32  # tokens that are refined together, where a checkpoint does not say
HUB_IDS = (
    "inclusionAI/LLaDA2.0-mini",
    "inclusionAI/LLaDA2.0-flash",
    "inclusionAI/LLaDA2.0-mini-preview",
    "inclusionAI/LLaDA2.0-flash-preview",
    "inclusionAI/LLaDA2.1-mini",
    "inclusionAI/LLaDA2.1-flash",
)
logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- configuration
# entries that change nothing here: names, training, and what other fields say too
_IDLE = frozenset(
    "architectures model_type torch_dtype dtype transformers_version auto_map initializer_range use_cache attention_dropout "
    "embedding_dropout output_dropout output_router_logits router_aux_loss_coef bos_token_id eos_token_id pad_token_id "
    "mask_token_id sliding_window max_window_layers use_qk_norm router_dtype norm_topk_prob rotary_dim "
    "num_nextn_predict_layers mtp_loss_scaling_factor moe_router_enable_routed_scaling block_size "
    "moe_shared_expert_intermediate_size".split()
)  # fmt: skip
# what this version computes; a checkpoint that says otherwise is refused
_ONLY: dict[str, tuple[object, ...]] = {
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "hidden_act": ("silu",),
    "score_function": ("sigmoid",),
    "moe_router_enable_expert_bias": (True,),
    "expert_capacity": (None,),
    "rope_scaling": (None, {}),
    "rope_parameters": (None, {}),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
}


def read_config(config: Mapping[str, Any]) -> TextConfig:
    """Checked. Raises WeightsError or Unsupported, naming the entry."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    known = {f.name for f in fields(TextConfig)}
    for key, allowed in _ONLY.items():
        if key in config and config[key] not in allowed:
            raise Unsupported(f"config.json: {key} = {config[key]!r}: this version runs {allowed[0]!r} only", param=key)
    idle = sorted(config.keys() - known - _IDLE - _ONLY.keys())
    if idle:
        logger.warning("config.json: %s: not known of a LLaDA2 model, and not used", ", ".join(idle))
    made = TextConfig.of({key: value for key, value in config.items() if key in known})
    if config.get("rotary_dim", made.rotary) != made.rotary:
        raise WeightsError(
            f"config.json: rotary_dim = {config['rotary_dim']}: partial_rotary_factor makes it {made.rotary}",
            param="rotary_dim",
        )
    shared = made.moe_intermediate_size * made.num_shared_experts
    if config.get("moe_shared_expert_intermediate_size", shared) not in (shared, None):
        raise WeightsError(
            "config.json: num_shared_experts: does not fit moe_shared_expert_intermediate_size", param="num_shared_experts"
        )
    return made


# ------------------------------------------------------------------------------------------------------- checkpoints
class Renamed:
    """A checkpoint under the names of the published ones: some have a prefix for the language part of a larger model.

    Raises WeightsError for stacked experts that are not (experts, out, in), since row by row they would be nonsense.
    """

    def __init__(self, source: Source, config: TextConfig):
        self.place = source.place
        self._source, self._config = source, config

    def names(self) -> set[str]:
        return {_canonical(name) for name in self._source.names()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        width, inner = self._config.hidden_size, self._config.moe_intermediate_size
        for name, tensor in self._source.tensors():
            shape = (self._config.num_experts, *((width, inner) if name.endswith("down_proj") else (inner, width)))
            if tensor.ndim == 3 and ".mlp.experts." in name and tuple(tensor.shape) != shape:
                raise WeightsError(f"{self.place}: {name} has shape {tuple(tensor.shape)}; it must be {shape}", param=name)
            yield _canonical(name), tensor


def _canonical(name: str) -> str:
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.") if name.startswith("model.lm_head.") else name


def has_norms(names: set[str]) -> bool:
    """Whether queries and keys are normed: config files differ about it, tensors don't."""
    return any(name.endswith("attention.query_layernorm.weight") for name in names)


def key_map(config: TextConfig, names: set[str]) -> KeyMap:
    """Our parameters and the tensors they are made of, given which names there are: experts come one by one, or stacked."""
    made: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("model.word_embeddings.weight",),
        "norm.weight": ("model.norm.weight",),
    }
    if "lm_head.weight" in names or not config.tie_word_embeddings:
        made["head.weight"] = ("lm_head.weight",)
    layers = {
        "norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
    }
    if has_norms(names):
        layers |= {"attention.query_norm": "attention.query_layernorm", "attention.key_norm": "attention.key_layernorm"}
    for i in range(config.num_hidden_layers):
        theirs = f"model.layers.{i}"
        made |= {f"blocks.{i}.{ours}.weight": (f"{theirs}.{name}.weight",) for ours, name in layers.items()}
        mlp = f"blocks.{i}.mlp"
        if i < config.first_k_dense_replace:
            made |= {f"{mlp}.{kind}.weight": (f"{theirs}.mlp.{kind}_proj.weight",) for kind in ("gate", "up", "down")}
            continue
        made[f"{mlp}.router.scores.weight"] = (f"{theirs}.mlp.gate.weight",)
        made[f"{mlp}.router.bias"] = (f"{theirs}.mlp.gate.expert_bias",)
        for kind in ("gate", "up", "down"):
            stacked = f"{theirs}.mlp.experts.{kind}_proj"
            each = tuple(f"{theirs}.mlp.experts.{e}.{kind}_proj.weight" for e in range(config.num_experts))
            made[f"{mlp}.experts.{kind}"] = (stacked,) if stacked in names else each
            if config.num_shared_experts:
                made[f"{mlp}.shared.{kind}.weight"] = (f"{theirs}.mlp.shared_experts.{kind}_proj.weight",)
    return made


def outline(config: TextConfig, source: Source, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> BlockCausal:
    """What a team's rank has of the model, without weights, on the meta device."""
    return unfilled(config, dtype, has_norms=has_norms(Renamed(source, config).names()), team=team)


def load(config: TextConfig, source: Source, dtype: torch.dtype, device: str, team: Team = ALONE) -> BlockCausal:
    """What a team's rank has of the model, in `dtype` but for its routers. Raises WeightsError where the weights do not fit."""
    renamed = Renamed(source, config)
    names = renamed.names()
    return filled(config, renamed, key_map(config, names), (dtype, device), has_norms=has_norms(names), team=team)

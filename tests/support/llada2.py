"""Random LLaDA2 checkpoints, and an independent reference: no cache, no packing, one explicit mask over everything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

# what `llada2_config` starts from: the published layouts, scaled down
TINY: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "vocab_size": 70,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 8,
    "rope_theta": 600000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "norm_head": False,
    "max_position_embeddings": 256,
}


def random_tensors(config: dict[str, Any], *, seed: int = 0, has_norms: bool = True) -> dict[str, torch.Tensor]:
    """A checkpoint in the published names."""
    generator = torch.Generator().manual_seed(seed)
    c = config

    def weight(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale / shape[-1] ** 0.5

    def norm(width: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(width, generator=generator)

    width, heads, keys, head = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    made = {
        "model.word_embeddings.weight": torch.randn(c["vocab_size"], width, generator=generator),
        "model.norm.weight": norm(width),
        "lm_head.weight": weight(c["vocab_size"], width, scale=3.0),
    }

    def mlp(prefix: str, inner: int) -> None:
        made[f"{prefix}.gate_proj.weight"] = weight(inner, width)
        made[f"{prefix}.up_proj.weight"] = weight(inner, width)
        made[f"{prefix}.down_proj.weight"] = weight(width, inner)

    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        made[f"{p}.input_layernorm.weight"], made[f"{p}.post_attention_layernorm.weight"] = norm(width), norm(width)
        made[f"{p}.attention.query_key_value.weight"] = weight((heads + 2 * keys) * head, width, scale=2.0)
        made[f"{p}.attention.dense.weight"] = weight(width, heads * head)
        if has_norms:
            made[f"{p}.attention.query_layernorm.weight"], made[f"{p}.attention.key_layernorm.weight"] = norm(head), norm(head)
        if i < c["first_k_dense_replace"]:
            mlp(f"{p}.mlp", c["intermediate_size"])
            continue
        made[f"{p}.mlp.gate.weight"] = weight(c["num_experts"], width)
        made[f"{p}.mlp.gate.expert_bias"] = 0.1 * torch.randn(c["num_experts"], generator=generator)
        for e in range(c["num_experts"]):
            mlp(f"{p}.mlp.experts.{e}", c["moe_intermediate_size"])
        if c["num_shared_experts"]:
            mlp(f"{p}.mlp.shared_experts", c["moe_intermediate_size"] * c["num_shared_experts"])
    return made


def write_model(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


@torch.no_grad()
def dense_logits(tensors: dict[str, torch.Tensor], config: dict[str, Any], ids: Sequence[int], size: int) -> torch.Tensor:
    """Logits of every position of one sequence of whole blocks, (tokens, vocabulary), after the research page's pseudo-code and
    the published modeling file: 4-D additive mask, no cache, one expert after the other, token by token."""
    c = config
    t = {name: tensor.double() for name, tensor in tensors.items()}
    eps, heads, keys, head = c["rms_norm_eps"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def swiglu(x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up, down = (t[f"{prefix}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    n, dim = len(ids), int(head * c["partial_rotary_factor"])
    block = torch.arange(n) // size
    mask = torch.where(block[:, None] >= block[None], 0.0, float("-inf")).double()[None, None]
    angle = torch.arange(n)[:, None] * c["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
    cos, sin = torch.cat((angle, angle), -1).cos()[:, None], torch.cat((angle, angle), -1).sin()[:, None]

    def rope(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :dim], x[..., dim:]
        swapped = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), -1)
        return torch.cat((turned * cos + swapped * sin, rest), -1)

    def moe(x: torch.Tensor, prefix: str) -> torch.Tensor:
        out = torch.zeros_like(x)
        for row, token in enumerate(x):
            score = torch.sigmoid(token @ t[f"{prefix}.gate.weight"].T)
            biased = score + t[f"{prefix}.gate.expert_bias"]
            by_group = biased.view(c["n_group"], -1)
            best = by_group.sort(-1, descending=True).values[:, :2].sum(-1).topk(c["topk_group"]).indices.tolist()
            allowed = [e for e in range(c["num_experts"]) if e // by_group.shape[1] in best]
            chosen = sorted(allowed, key=lambda e: -biased[e].item())[: c["num_experts_per_tok"]]
            total = sum(score[e] for e in chosen) + 1e-20
            for e in chosen:
                out[row] += score[e] / total * c["routed_scaling_factor"] * swiglu(token[None], f"{prefix}.experts.{e}")[0]
        return out + (swiglu(x, f"{prefix}.shared_experts") if c["num_shared_experts"] else 0)

    x = t["model.word_embeddings.weight"][list(ids)]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        h = rms(x, t[f"{p}.input_layernorm.weight"])
        qkv = (h @ t[f"{p}.attention.query_key_value.weight"].T).view(n, heads + 2 * keys, head)
        q, k, v = qkv.split([heads, keys, keys], 1)
        if f"{p}.attention.query_layernorm.weight" in t:
            q, k = rms(q, t[f"{p}.attention.query_layernorm.weight"]), rms(k, t[f"{p}.attention.key_layernorm.weight"])
        q, k = rope(q), rope(k)
        k, v = (u.repeat_interleave(heads // keys, 1) for u in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k)[None] * head**-0.5 + mask
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[0], v).reshape(n, heads * head)
        x = x + attended @ t[f"{p}.attention.dense.weight"].T
        h = rms(x, t[f"{p}.post_attention_layernorm.weight"])
        x = x + (swiglu(h, f"{p}.mlp") if i < c["first_k_dense_replace"] else moe(h, f"{p}.mlp"))
    head_weight = t.get("lm_head.weight", t["model.word_embeddings.weight"])
    if c["norm_head"]:
        head_weight = head_weight / head_weight.norm(dim=0, keepdim=True)
    return rms(x, t["model.norm.weight"]) @ head_weight.T


SPECIALS = ["<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]
BYTES_FIRST = len(SPECIALS)


def write_tokenizer(path: Path, template: str | None = None) -> None:
    """A tokenizer of single bytes, with the published special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = [*SPECIALS, *(bytes_to_unicode()[byte] for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mask|>"
    )
    made.chat_template = template
    made.save_pretrained(path)


def text_repository(path: Path, changes: dict[str, Any] | None = None, *, template: str | None = None, seed: int = 0) -> Path:
    """A random model of blocks of 8 tokens that speaks bytes."""
    config = {**TINY, "vocab_size": 272, "block_size": 8, **(changes or {})}
    write_model(path, config, random_tensors(config, seed=seed))
    write_tokenizer(path, template)
    return path


def byte_ids(text: str) -> list[int]:
    return [byte + BYTES_FIRST for byte in text.encode()]

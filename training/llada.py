"""The bundled text model in plain PyTorch, for training: LLaDA2's layout with the published tensor names, and its tokenizer.

`state_dict()` is the checkpoint. Sequences of a batch share one layout (positions and one mask), so nothing is padded.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END, MASK = "<|endoftext|>", "<|mask|>"
SPECIALS = (END, MASK, "<role>", "</role>", "<|role_end|>")
WHOLE = ("SYSTEM", "HUMAN", "ASSISTANT", "OBSERVATION", "detailed thinking off")  # single tokens, since every prompt has them
BLOCK = 32
CONFIG: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 16,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "norm_head": False,
    "max_position_embeddings": 2048,
    "block_size": BLOCK,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "mask_token_id": 1,
    "torch_dtype": "bfloat16",
}
# Ling 2.0's and LLaDA2's turns: the prompt as `stepwell.stages.tokens.rendered` writes it
TEMPLATE = (
    "{%- set roles = {'user': 'HUMAN', 'assistant': 'ASSISTANT', 'tool': 'OBSERVATION'} -%}"
    "{{- '<role>SYSTEM</role>' -}}"
    "{%- if messages and messages[0].role == 'system' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}"
    "{%- if tools -%}"
    "{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}"
    "{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n'
    "</tool_call>\\n' -}}"
    "{%- endif -%}"
    "{{- 'detailed thinking off<|role_end|>' -}}"
    "{%- for message in messages -%}"
    "{%- if not (loop.first and message.role == 'system') -%}"
    "{{- '<role>' + roles.get(message.role, 'SYSTEM') + '</role>' -}}"
    "{%- if message.role == 'tool' -%}{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}"
    "{%- else -%}{{- message.content -}}{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}"
    "{%- set function = call.function or call -%}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + function.name + \'", "arguments": \' -}}'
    "{{- function.arguments if function.arguments is string else function.arguments | tojson -}}"
    "{{- '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|role_end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Single bytes, the published special tokens, and the words of the template."""
    names = [*SPECIALS, *(bytes_to_unicode()[byte] for byte in range(256))]
    made = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS))
    made.add_tokens([AddedToken(word, normalized=False) for word in WHOLE])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END,
        pad_token=END,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        model_max_length=CONFIG["max_position_embeddings"],
    )
    fast.chat_template = TEMPLATE
    return fast


# ------------------------------------------------------------------------------------------------------------- layers
class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, CONFIG["rms_norm_eps"])


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Chooses experts by biased scores in the best groups and weighs them by their own (DeepSeek-V3 §2.1.2). `load` counts
    tokens for `balance`, which moves the bias; gradients never do."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config["num_experts"], config["hidden_size"]) * 0.02)
        self.register_buffer("expert_bias", torch.zeros(config["num_experts"]))
        self.register_buffer("load", torch.zeros(config["num_experts"]), persistent=False)
        self.groups, self.top_groups = config["n_group"], config["topk_group"]
        self.top, self.scale = config["num_experts_per_tok"], config["routed_scaling_factor"]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(F.linear(x, self.weight))
        choice = (scores.detach() + self.expert_bias).view(len(x), self.groups, -1)
        strength = choice.topk(min(2, choice.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(strength).scatter_(1, strength.topk(self.top_groups, -1).indices, 1.0) > 0
        ids = choice.masked_fill(~kept[..., None], float("-inf")).flatten(1).topk(self.top, -1).indices
        if self.training:
            self.load += torch.bincount(ids.flatten(), minlength=len(self.load))
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Without an auxiliary loss: what has too little work becomes a little more attractive."""
        self.expert_bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Moe(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, inner = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = Gate(config)
        self.experts = nn.ModuleList(Mlp(width, inner) for _ in range(config["num_experts"]))
        self.shared_experts = Mlp(width, inner * config["num_shared_experts"])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        ids, weights = self.gate(flat)
        order = ids.flatten().argsort()
        counts = ids.flatten().bincount(minlength=len(self.experts)).tolist()
        rows = flat[order // ids.shape[1]].split(counts)
        made = torch.cat([expert(own) for expert, own in zip(self.experts, rows, strict=True)])
        made = made[order.argsort()].view(*ids.shape, -1)
        return ((made * weights[..., None]).sum(1) + self.shared_experts(flat)).view_as(x)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.heads, self.key_heads, self.head = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        width = config["hidden_size"]
        self.query_key_value = nn.Linear(width, (self.heads + 2 * self.key_heads) * self.head, bias=False)
        self.dense = nn.Linear(self.heads * self.head, width, bias=False)
        self.query_layernorm, self.key_layernorm = Norm(self.head), Norm(self.head)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.query_key_value(x).view(batch, length, -1, self.head).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.key_heads, self.key_heads), 1)
        q, k = rotated(self.query_layernorm(q), rotary), rotated(self.key_layernorm(k), rotary)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.dense(out.transpose(1, 2).reshape(batch, length, -1))


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The leading channels turned, in halves; the others as they are."""
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], index: int):
        super().__init__()
        self.input_layernorm = Norm(config["hidden_size"])
        self.attention = Attention(config)
        self.post_attention_layernorm = Norm(config["hidden_size"])
        is_dense = index < config["first_k_dense_replace"]
        self.mlp = Mlp(config["hidden_size"], config["intermediate_size"]) if is_dense else Moe(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.word_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"])


class Llada(nn.Module):
    """Logits of the tokens at the same positions."""

    def __init__(self, config: dict[str, Any] = CONFIG):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 if "embeddings" in name or "gate.weight" in name else 0.05)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, rows: int) -> Tensor:
        """ids: (batch, tokens); positions: (tokens,); mask: (tokens, tokens), True where a query sees a key; logits of the first
        `rows` tokens -> (batch, rows, vocabulary)"""
        config = self.config
        half = torch.arange(0, config["rotary_dim"], 2, dtype=torch.float32)
        angle = positions[:, None].float() * config["rope_theta"] ** (-half / config["rotary_dim"])
        rotary = angle.cos(), angle.sin()
        x = self.model.word_embeddings(ids)
        for layer in self.model.layers:
            x = layer(x, rotary, mask)
        return self.lm_head(self.model.norm(x[:, :rows]))

    def gates(self) -> list[Gate]:
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, Moe)]

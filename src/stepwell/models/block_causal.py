"""What block-diffusion language models share: grouped-query attention under a block-causal mask, and feed-forwards that are dense
or a mixture of experts. A position predicts its own token, there is no time embedding, and a row sees its whole block and all
blocks before it.

Reference: SGLang `models/llada2.py` and `models/sdar.py`; the checkpoints' own modeling files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.cache.pages import PagePool
from stepwell.errors import InvalidRequest, WeightsError
from stepwell.models.spec import KeyMap
from stepwell.ops.blocks import Blocks
from stepwell.ops.experts import Experts
from stepwell.ops.linear import Linear
from stepwell.ops.norm import rms_norm
from stepwell.ops.packing import Segments
from stepwell.ops.rope import half_table, rotate_half
from stepwell.ops.spans import Span, SpanKernel, SpanLayout, dense_spans
from stepwell.ops.split import COLUMNS, Split
from stepwell.parallel.team import ALONE, Team
from stepwell.parallel.tensor import join, split
from stepwell.weights.reader import Source, load_weights

FP32 = ("router.scores.weight", "router.bias")  # endings of parameters that keep float32
UNUSED = ("v_head", "inv_freq")


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A config.json; names are those of LLaDA2's, and what has no default here must be there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_shared_experts: int
    first_k_dense_replace: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    max_position_embeddings: int
    partial_rotary_factor: float
    rope_theta: float
    rms_norm_eps: float
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    tie_word_embeddings: bool = False
    norm_head: bool = False
    score_function: str = "sigmoid"  # of the router; or softmax, without a bias
    has_unit_weights: bool = True  # a row's weights of its experts are divided by their sum

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> TextConfig:
        """Checked. Raises WeightsError, naming the entry."""
        try:
            made = TypeAdapter(cls).validate_python(entries)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise WeightsError(f"config.json: {name}: {first['msg']}", param=name) from None
        made._check()
        return made

    def _check(self) -> None:
        def fail(name: str, why: str) -> None:
            raise WeightsError(f"config.json: {name} = {getattr(self, name)}: {why}", param=name)

        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in ("head_dim", "num_shared_experts", "first_k_dense_replace") else 1
            if f.type == "int" and not least <= value < 2**31:
                fail(f.name, f"must be {least} or more")
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            fail("hidden_size", "does not divide by num_attention_heads, and there is no head_dim")
        if self.num_attention_heads % self.num_key_value_heads:
            fail("num_attention_heads", f"must be a multiple of num_key_value_heads, {self.num_key_value_heads}")
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            fail("n_group", "must divide num_experts and be at least topk_group")
        if not self.num_experts_per_tok <= self.num_experts // self.n_group * self.topk_group:
            fail("num_experts_per_tok", "is more than the experts of topk_group groups")
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary % 2:
            fail("partial_rotary_factor", f"must make an even number of {self.head} channels")

    @property
    def head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary(self) -> int:
        return int(self.head * self.partial_rotary_factor)


# ------------------------------------------------------------------------------------------------------------ layers
@dataclass(frozen=True, slots=True)
class TextCall:
    """What the layers of one forward share. `made` collects each layer's new keys and values, (rows, key heads, head_dim)."""

    layout: SpanLayout
    pool: PagePool
    rotary: tuple[Tensor, Tensor]
    made: list[tuple[Tensor, Tensor]]

    @property
    def blocks(self) -> Segments:
        return self.layout.blocks


class Norm(nn.Module):
    """RMS norm with a weight, its statistics in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms_norm(x.float(), eps=self.eps).to(x.dtype)


class Attending(nn.Module):
    """Grouped-query attention over a row's own block and all before it; queries and keys are normed where there are weights."""

    def __init__(self, config: TextConfig, *, has_norms: bool):
        super().__init__()
        self.heads, self.key_heads, self.head = config.num_attention_heads, config.num_key_value_heads, config.head
        self.qkv = Linear(config.hidden_size, (self.heads + 2 * self.key_heads) * self.head, bias=False)
        self.out = Linear(self.heads * self.head, config.hidden_size, bias=False)
        self.query_norm = Norm(self.head, config.rms_norm_eps) if has_norms else None
        self.key_norm = Norm(self.head, config.rms_norm_eps) if has_norms else None
        self.kernel: SpanKernel = dense_spans

    def split(self, count: int) -> dict[str, Split]:
        """By heads: each part has its own queries, and the keys and values they look at."""
        if self.key_heads % count:
            raise InvalidRequest(f"tp_size = {count}: must divide the model's {self.key_heads} key heads", param="tp_size")
        groups = [heads * self.head for heads in (self.heads, self.key_heads, self.key_heads)]
        self.heads, self.key_heads = self.heads // count, self.key_heads // count
        return {"qkv.weight": Split(groups), "out.weight": COLUMNS}

    def forward(self, x: Tensor, call: TextCall) -> Tensor:
        qkv = self.qkv(x, call.blocks).view(len(x), -1, self.head)
        q, k, v = qkv.split((self.heads, self.key_heads, self.key_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = (rotate_half(t.float(), call.rotary).to(x.dtype) for t in (q, k))
        kept = call.pool.storage[len(call.made)]
        call.made.append((k, v))
        return self.out(self.kernel(q, k, v, kept, call.layout), call.blocks)


def divided(inner: int, count: int) -> int:
    """So many inner channels, once they are known to be split evenly. Raises InvalidRequest."""
    if inner % count:
        raise InvalidRequest(f"tp_size = {count}: must divide the {inner} inner channels of a feed-forward", param="tp_size")
    return inner


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x))"""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate = Linear(width, inner, bias=False)
        self.up = Linear(width, inner, bias=False)
        self.down = Linear(inner, width, bias=False)

    def split(self, count: int) -> dict[str, Split]:
        """By inner channels."""
        inner = divided(self.gate.out_features, count)
        return {"gate.weight": Split([inner]), "up.weight": Split([inner]), "down.weight": COLUMNS}

    def forward(self, x: Tensor, blocks: Segments) -> Tensor:
        return self.down(F.silu(self.gate(x, blocks)) * self.up(x, blocks), blocks)


class Router(nn.Module):
    """Which experts a row takes, and how much of each, in float32. By sigmoid (DeepSeek-V3 §2.1.2): a bias and the best groups
    decide the choice, and the scores without the bias the weights. Or plainly by softmax."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.scores = Linear(config.hidden_size, config.num_experts, bias=False)
        self.is_softmax, self.has_unit_weights = config.score_function == "softmax", config.has_unit_weights
        self.bias = None if self.is_softmax else nn.Parameter(torch.zeros(config.num_experts))
        self.groups, self.top_groups, self.top = config.n_group, config.topk_group, config.num_experts_per_tok
        self.scale = config.routed_scaling_factor

    def forward(self, x: Tensor, blocks: Segments) -> tuple[Tensor, Tensor]:
        """x: (rows, width) -> expert ids and float32 weights, (rows, experts per token)"""
        logits = self.scores(x.float(), blocks)
        scores = logits.softmax(-1) if self.is_softmax else torch.sigmoid(logits)
        choice = scores if self.bias is None else scores + self.bias
        if self.groups > 1:
            grouped = choice.view(len(x), self.groups, -1)
            strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            best = strength.topk(self.top_groups, dim=-1).indices
            is_out = torch.ones_like(strength, dtype=torch.bool).scatter_(1, best, False)
            choice = grouped.masked_fill(is_out[..., None], float("-inf")).flatten(1)
        ids = choice.topk(self.top, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.has_unit_weights:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * self.scale


class MixtureOfExperts(nn.Module):
    """A few experts of many, and one that all rows share."""

    def __init__(self, config: TextConfig):
        super().__init__()
        inner = config.moe_intermediate_size
        self.router = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, inner)
        shared = config.num_shared_experts
        self.shared = GatedMlp(config.hidden_size, inner * shared) if shared else None

    def split(self, count: int) -> dict[str, Split]:
        """By inner channels of every expert; the choice of experts is the same everywhere."""
        inner = [divided(len(self.experts.gate) // self.experts.count, count)] * self.experts.count
        splits = {"experts.gate": Split(inner), "experts.up": Split(inner), "experts.down": COLUMNS}
        shared = {} if self.shared is None else self.shared.split(count)
        return splits | {f"shared.{name}": how for name, how in shared.items()}

    def forward(self, x: Tensor, blocks: Segments) -> Tensor:
        mixed = self.experts(x, *self.router(x, blocks), blocks)
        return mixed if self.shared is None else mixed + self.shared(x, blocks)


class Layer(nn.Module):
    """Attention, then a feed-forward, dense in the first layers."""

    def __init__(self, config: TextConfig, index: int, *, has_norms: bool):
        super().__init__()
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attending(config, has_norms=has_norms)
        self.mlp_norm = Norm(config.hidden_size, config.rms_norm_eps)
        is_dense = index < config.first_k_dense_replace
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size) if is_dense else MixtureOfExperts(config)

    def forward(self, x: Tensor, call: TextCall) -> Tensor:
        x = x + self.attention(self.norm(x), call)
        return x + self.mlp(self.mlp_norm(x), call.blocks)


class BlockCausal(nn.Module):
    """The model. `pack` lays spans out, `forward` computes one step of them."""

    def __init__(self, config: TextConfig, *, has_norms: bool):
        super().__init__()
        self.config = config
        # given its weight, as the random one of its own takes torch's compiler to make on the meta device: 1.4 s of imports
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        layers = range(config.num_hidden_layers)
        self.blocks = Blocks([Layer(config, index, has_norms=has_norms) for index in layers])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def key_heads(self) -> int:
        """Those that are here."""
        return next(module.key_heads for module in self.modules() if isinstance(module, Attending))

    def pool(self, pages: int, size: int) -> PagePool:
        """Room for the keys and values of so many blocks of `size` tokens."""
        return PagePool(self.config.num_hidden_layers, pages, size, (self.key_heads, self.config.head), self.norm.weight)

    def page_bytes(self, size: int) -> int:
        """What one page of `size` tokens holds."""
        c = self.config
        return 2 * c.num_hidden_layers * size * self.key_heads * c.head * self.norm.weight.element_size()

    def pack(self, spans: Sequence[Span], size: int) -> SpanLayout:
        """Lay spans of blocks of `size` tokens out as one batch."""
        return SpanLayout(spans, size, self.device)

    @torch.no_grad()
    def forward(self, layout: SpanLayout, pool: PagePool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits of the rows asked for, (rows, vocabulary) float32; and keys and values of all rows, layer by layer."""
        made: list[tuple[Tensor, Tensor]] = []
        rotary = half_table(layout.positions, self.config.rotary, self.config.rope_theta)
        x = self.blocks(self.embedding(layout.ids), TextCall(layout, pool, rotary, made))
        if not len(layout.wanted):
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32), made
        return self.head(self.norm(x[layout.wanted]), layout.asked).float(), made


# ---------------------------------------------------------------------------------------------------------- weights
def unfilled(config: TextConfig, dtype: torch.dtype = torch.float32, *, has_norms: bool, team: Team = ALONE) -> BlockCausal:
    """What a team's rank has of the model, on the meta device, in a precision but for its routers."""
    with torch.device("meta"):
        model = BlockCausal(config, has_norms=has_norms)
    part = split(model, team)
    for name, parameter in model.named_parameters():
        parameter.data = part(name, parameter.data).to(torch.float32 if name.endswith(FP32) else dtype)
    join(model, team)
    return model


def filled(
    config: TextConfig, source: Source, keys: KeyMap, where: tuple[torch.dtype, str], *, has_norms: bool, team: Team
) -> BlockCausal:  # fmt: skip
    """What a team's rank has of the model, with a checkpoint's tensors as `keys` names them, in a precision and on a device."""
    model = unfilled(config, has_norms=has_norms)
    part = split(model, team)

    def place(name: str, tensor: Tensor) -> Tensor:
        if name == "head.weight" and config.norm_head:
            tensor = F.normalize(tensor, dim=0, eps=1e-7)
        dtype, device = where
        return part(name, tensor).to(device, torch.float32 if name.endswith(FP32) else dtype)

    load_weights(model, source, keys, torch.float32, place, unused=UNUSED)
    if model.head.weight.is_meta:
        model.head.weight = model.embedding.weight
    join(model, team)
    return model.eval()

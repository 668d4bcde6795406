"""Attention kernels: sparse patterns against brute force, vendors' adapters against fakes of the vendors' signatures."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.config.attention import Shape
from stepwell.config.hardware import Hardware
from stepwell.config.load import load
from stepwell.config.resolve import Plan, resolve
from stepwell.config.schema import EngineOptions
from stepwell.engine.kernels import AttentionPass, find_broken
from stepwell.errors import StepwellError, Unsupported
from stepwell.models.flux import DEV, SCHNELL
from stepwell.ops.attention import Attention, AttentionKernel
from stepwell.ops.backends import sdpa, sliding_tile_attn
from stepwell.ops.backends.block_sparse_torch import BlockSparse, kept_tiles
from stepwell.ops.backends.sliding_tile_torch import Planner, SlidingTile
from stepwell.ops.backends.varlen import VarlenAttention
from stepwell.ops.backends.video_sparse_attn import VendorBlockSparse
from stepwell.ops.packing import Lane, Segments

Grid = tuple[int, int, int]
HEADS, DIM = 2, 16


def packed(*shapes: tuple[int, Grid], step: int = 0, steps: int = 4) -> Segments:
    """A batch of sequences: (prefix, grid) each."""
    lanes = [Lane(None, steps, prefix, grid, step) for prefix, grid in shapes]
    return Segments([lane.prefix + lane.tokens for lane in lanes], lanes)


def inputs(
    segments: Segments, heads: int = HEADS, dim: int = DIM, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """q, k, v as a model hands them over: views of one (tokens, 3, heads, dim)"""
    qkv = torch.randn(segments.total, 3, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return list(qkv.unbind(1))


def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention where `allowed` (heads, queries, keys) says so, in float64; (tokens, heads · dim)"""
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~allowed, -math.inf)
    return (torch.softmax(scores, -1) @ v).transpose(0, 1).flatten(1)


def tile_of(grid: Grid, tile: Grid) -> list[Grid]:
    """The tile of every token, in the grid's order."""
    places = itertools.product(*(range(size) for size in grid))
    return [tuple(i // min(step, size) for i, step, size in zip(place, tile, grid, strict=True)) for place in places]  # type: ignore[misc]


def window_mask(prefix: int, grid: Grid, windows: tuple[Grid, ...], tile: Grid) -> Tensor:
    """Sliding tile attention's mask, token by token."""
    tiles = tile_of(grid, tile)
    counts = [-(-size // min(step, size)) for size, step in zip(grid, tile, strict=True)]
    length = prefix + len(tiles)
    allowed = torch.ones(len(windows), length, length, dtype=torch.bool)
    for head, window in enumerate(windows):
        for query, own in enumerate(tiles):
            for key, other in enumerate(tiles):
                for i, j, size, count in zip(own, other, window, counts, strict=True):
                    half = size // 2
                    centre = min(max(i, half), count - 1 - half) if count > 2 * half else None
                    if centre is not None and abs(centre - j) > half:
                        allowed[head, prefix + query, prefix + key] = False
    return allowed


# ------------------------------------------------------------------------------------------------------ sparse patterns
@pytest.mark.parametrize("seed", range(12))
def test_sliding_tiles_against_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    tile = (draw.choice((1, 2, 6)), draw.choice((2, 3, 8)), draw.choice((2, 3, 8)))
    grid = (draw.choice((1, 1, 3, 5)), draw.randint(1, 11), draw.randint(1, 11))
    windows = tuple((draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 4)) for _ in range(HEADS))
    prefix = draw.choice((0, 1, 7))
    segments = packed((prefix, grid))
    q, k, v = inputs(segments, seed=seed)
    out = SlidingTile(lambda step, steps: windows, Planner(tile))(q, k, v, segments)
    assert (out - masked(q, k, v, window_mask(prefix, grid, windows, tile))).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_block_sparse_against_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    tile = (draw.choice((1, 2, 4)), draw.choice((2, 3, 4)), draw.choice((2, 3, 4)))
    grid = (draw.choice((1, 1, 3, 5)), draw.randint(1, 11), draw.randint(1, 11))
    prefix, sparsity = draw.choice((0, 1, 7)), draw.choice((0.0, 0.25, 0.5, 0.9))
    segments = packed((prefix, grid))
    q, k, v = inputs(segments, seed=seed)
    tiles = tile_of(grid, tile)
    names = sorted(set(tiles))
    members = {name: torch.tensor([prefix + i for i, own in enumerate(tiles) if own == name]) for name in names}
    keep = max(1, math.ceil((1 - sparsity) * len(names)))
    allowed = torch.ones(HEADS, segments.total, segments.total, dtype=torch.bool)
    for head, own in itertools.product(range(HEADS), names):
        query = q[members[own], head].mean(0)
        scores = {name: float(query @ k[members[name], head].mean(0)) for name in names}
        for name in sorted(names, key=lambda name: -scores[name])[keep:]:
            allowed[head, members[own][:, None], members[name]] = False
    out = BlockSparse(sparsity, lambda grid: tile)(q, k, v, segments)
    assert (out - masked(q, k, v, allowed)).abs().max() < 1e-5


MIXED = packed((5, (1, 9, 17)), (5, (1, 9, 17)), (0, (7, 8, 10)), (3, (1, 4, 4)), (9, (2, 20, 9)))
PATTERNS: dict[str, Callable[[], AttentionKernel]] = {
    "sliding": lambda: SlidingTile(lambda step, steps: ((1, 1, 1), (3, 3, 1)), Planner()),
    "block sparse": lambda: BlockSparse(0.5),
}


def test_wide_windows_and_no_sparsity_are_dense_attention() -> None:
    q, k, v = inputs(MIXED)
    dense = sdpa.attend(q, k, v, MIXED)
    for kernel in (SlidingTile(lambda step, steps: ((9, 9, 9), (2, 4, 6)), Planner()), BlockSparse(0.0)):
        assert (kernel(q, k, v, MIXED) - dense).abs().max() < 1e-5
    for make in PATTERNS.values():
        assert (make()(q, k, v, MIXED) - dense).abs().max() > 0.1, "nothing was left out, so nothing was tested"


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone_and_in_company(name: str, dtype: torch.dtype) -> None:
    kernel, alone = PATTERNS[name](), PATTERNS[name]()
    q, k, v = inputs(MIXED, dtype=dtype)
    together = kernel(q, k, v, MIXED).split(MIXED.lengths)
    for lane, out, *qkv in zip(MIXED.lanes, together, *(MIXED.split(t) for t in (q, k, v)), strict=True):
        own = Segments([lane.prefix + lane.tokens], [lane])
        assert torch.equal(alone(*(t.clone() for t in qkv), own), out)


def test_windows_follow_each_sequence_s_own_step() -> None:
    """Two samples at different steps, in one batch."""
    early, late = Lane(None, 4, 2, (1, 16, 16), 0), Lane(None, 4, 2, (1, 16, 16), 3)
    both = Segments([258, 258], [early, late])
    q, k, v = inputs(both)

    def windows(step: int, steps: int) -> tuple[Grid, ...]:
        return ((1, 1, 1) if step == 0 else (1, 3, 3),) * HEADS

    out = SlidingTile(windows, Planner())(q, k, v, both)
    dense = sdpa.attend(q, k, v, both)
    assert (out[258:] - dense[258:]).abs().max() < 1e-5 < (out[:258] - dense[:258]).abs().max()


def test_kept_tiles_rounds_up_and_keeps_one() -> None:
    assert [kept_tiles(10, sparsity) for sparsity in (0.0, 0.5, 0.55, 0.99)] == [10, 5, 5, 1]


def test_cudnn_first_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(MIXED)
    monkeypatch.setattr(sdpa, "WORTH_FLOPS", 0)
    assert torch.equal(sdpa.attend_cudnn(q, k, v, MIXED), sdpa.attend(q, k, v, MIXED))


# ----------------------------------------------------------------------------------------------------- vendors' libraries
def per_sequence(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    parts = []
    for start, stop in itertools.pairwise(starts):
        parts.append(F.scaled_dot_product_attention(*(t[start:stop].transpose(0, 1) for t in (q, k, v))).transpose(0, 1))
    return torch.cat(parts)


def varlen(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """What all flash_attn_varlen_func do; rest: offsets of queries and keys, the longest of each."""
    offsets_q, offsets_k, longest_q, longest_k = rest
    for tensor in (q, k, v):
        assert tensor.ndim == 3 and tensor.stride(-1) == 1
    for offsets, longest in ((offsets_q, longest_q), (offsets_k, longest_k)):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous() and int(offsets[-1]) == len(q)
        assert longest == int(offsets.diff().max()) and type(longest) is int
    return per_sequence(q, k, v, offsets_q.tolist())


def fa2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
        block_table=None):  # type: ignore[no-untyped-def]  # fmt: skip
    assert (dropout_p, softmax_scale, causal, window_size, return_attn_probs) == (0.0, None, False, (-1, -1), False)
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def fa3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
        causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
        return_attn_probs=False):  # type: ignore[no-untyped-def]  # fmt: skip
    assert (seqused_q, seqused_k, softmax_scale, causal, qv, return_attn_probs) == (None, None, None, False, None, False)
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def fa4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None,
        page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, aux_tensors=None,
        return_lse=False):  # type: ignore[no-untyped-def]  # fmt: skip
    assert (seqused_q, page_table, softmax_scale, causal, learnable_sink) == (None, None, None, False, None)
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None


def aiter(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
          window_size=(-1, -1), alibi_slopes=None, deterministic=False, return_lse=False, return_attn_probs=False,
          block_table=None):  # type: ignore[no-untyped-def]  # fmt: skip
    assert (dropout_p, softmax_scale, causal, return_lse, return_attn_probs) == (0.0, None, False, False, False)
    return (varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):  # type: ignore[no-untyped-def]
    assert not is_causal and sm_scale is None and not return_lse and not kwargs
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    if tensor_layout == "NHD":
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)


def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):  # type: ignore[no-untyped-def]
    assert attn_mask is None and not is_causal and per_block_mean and not kwargs
    k -= k.mean(dim=-2, keepdim=True)  # in place, as the original does; softmax does not see it
    return F.scaled_dot_product_attention(q, k, v).contiguous()


def sliding_tile_attention(q_all, k_all, v_all, window_size, text_length, has_text=True,
                           dit_seq_shape="30x48x80"):  # type: ignore[no-untyped-def]  # fmt: skip
    """The kernel's mask from its own layout: tiles of 6×8×8 in order, then text."""
    grid = tuple(int(size) for size in dit_seq_shape.split("x"))
    batch, heads, length, _ = q_all.shape
    counts = [size // step for size, step in zip(grid, (6, 8, 8), strict=True)]
    image = math.prod(grid)
    assert batch == 1 and len(window_size) == heads and length == image + text_length and has_text == (text_length > 0)
    assert q_all.is_contiguous() and k_all.is_contiguous() and v_all.is_contiguous()
    index = torch.arange(image) // 384
    where = [index // (counts[1] * counts[2]), index // counts[2] % counts[1], index % counts[2]]
    allowed = torch.ones(heads, length, length, dtype=torch.bool)
    for head, window in enumerate(window_size):
        near = torch.ones(image, image, dtype=torch.bool)
        for own, size, count in zip(where, window, counts, strict=True):
            centre = own.clamp(size // 2, max(size // 2, count - 1 - size // 2))
            near &= (centre[:, None] - own[None]).abs() <= size // 2
        allowed[head, :image, :image] = near
    return F.scaled_dot_product_attention(q_all, k_all, v_all, attn_mask=allowed)


def video_sparse_attn(q, k, v, variable_block_sizes, topk, block_size, compress_attn_weight=None,
                      q_variable_block_sizes=None):  # type: ignore[no-untyped-def]  # fmt: skip
    assert math.prod(block_size) == 64 and q.shape[2] % 64 == 0 and variable_block_sizes.numel() == q.shape[2] // 64
    assert compress_attn_weight.shape == q.shape and q.is_contiguous()
    _, heads, length, dim = q.shape
    count = length // 64
    filling = torch.arange(64)[None] >= variable_block_sizes[:, None]
    for tensor in (q, k, v):  # "we assume q, k, v is zero padded"
        assert not tensor.view(heads, count, 64, dim)[:, filling].any()
    pooled = [t.view(1, heads, count, 64, dim).sum(3) / variable_block_sizes.view(1, 1, -1, 1) for t in (q, k, v)]
    scores = torch.softmax(pooled[0] @ pooled[1].transpose(2, 3) / dim**0.5, -1)
    coarse = (scores @ pooled[2]).repeat_interleave(64, dim=2)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(topk, dim=-1).indices, True)
    allowed = chosen.repeat_interleave(64, 2).repeat_interleave(64, 3) & ~filling.flatten()[None, None, None]
    return coarse * compress_attn_weight + F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


class Model(nn.Module):
    """Three attention layers under names such as a model has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attention": Attention()}) for _ in range(12))

    def kernel(self, layer: int) -> AttentionKernel:
        found = self.blocks[layer]["attention"]  # type: ignore[index]
        assert isinstance(found, Attention)
        return found.kernel


GPU = Hardware(gpu="a GPU", memory_bytes=2**40)
VIDEO = frozenset({"sliding_tile_attn", "video_sparse_attn"})  # what a model of videos may say it fits


def passed(hardware: Hardware, dim: int = 64, patterns: frozenset[str] = VIDEO, **flags: Any) -> Model:
    """A model after the attention pass, as if on this machine."""
    options = load((EngineOptions,), flags=flags, environ={})[EngineOptions]
    shape, model = Shape(HEADS, dim, patterns), Model()

    def plan() -> Plan:
        return resolve(options, parameters=1, text_encoders=2, hardware=hardware, shape=shape)

    while broken := find_broken(plan(), hardware):
        hardware = replace(hardware, broken={**hardware.broken, **broken})
    AttentionPass.of(options, plan(), model, shape, hardware).apply(model)
    return model


def vendor(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    made = ModuleType(module)
    vars(made).update(functions)
    parents = module.split(".")[:-1]
    for count in range(1, len(parents) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parents[:count]), ModuleType(".".join(parents[:count])))
    monkeypatch.setitem(sys.modules, module, made)


@pytest.mark.parametrize(
    ("module", "functions", "hardware", "name"),
    [
        ("flash_attn", {"flash_attn_varlen_func": fa2}, replace(GPU, capability=(8, 0)), "fa"),
        ("flash_attn_interface", {"flash_attn_varlen_func": fa3}, replace(GPU, capability=(9, 0)), "auto"),
        ("flash_attn.cute", {"flash_attn_varlen_func": fa4}, replace(GPU, capability=(10, 0)), "fa4"),
        ("flash_attn", {"flash_attn_varlen_func": fa2}, replace(GPU, capability=(9, 4), rocm=True), "auto"),
        ("aiter", {"flash_attn_varlen_func": aiter}, replace(GPU, capability=(9, 4), rocm=True), "aiter"),
        ("sageattention", {"sageattn": sageattn}, replace(GPU, capability=(8, 9)), "sage_attn"),
        ("sageattn3", {"sageattn3_blackwell": sageattn3_blackwell}, replace(GPU, capability=(12, 0)), "sage_attn_3"),
    ],
)
@pytest.mark.parametrize("shapes", [[(5, (1, 4, 4))], [(5, (1, 4, 4)), (5, (1, 4, 4)), (0, (3, 2, 5)), (0, (1, 1, 1))]])
def test_dense_adapters(
    module: str, functions: dict[str, Any], hardware: Hardware, name: str, shapes: list[tuple[int, Grid]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    vendor(monkeypatch, module, **functions)
    kernel = passed(replace(hardware, packages=frozenset({module})), attention_backend=name).kernel(0)
    segments = packed(*shapes)
    for heads in (1, HEADS):  # one head, one token: transposing copies nothing, so changes in place would show
        q, k, v = inputs(segments, heads=heads)
        before = [t.clone() for t in (q, k, v)]
        assert (kernel(q, k, v, segments) - sdpa.attend(*before, segments)).abs().max() < 1e-5
        assert all(torch.equal(t, was) for t, was in zip((q, k, v), before, strict=True))


def test_sliding_tile_adapter_against_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vendor(monkeypatch, "st_attn", sliding_tile_attention=sliding_tile_attention)
    monkeypatch.setattr(sliding_tile_attn, "WITH_TEXT", ((6, 24, 8),))
    monkeypatch.setattr(sliding_tile_attn, "WITHOUT_TEXT", ((12, 16, 8),))
    hardware = replace(GPU, capability=(9, 0), packages=frozenset({"st_attn"}))
    options = {"attention_backend": "sliding_tile_attn", "sliding_tile_window": "1,1,3"}
    kernel = passed(hardware, **options).kernel(0)
    plain = passed(Hardware(), **{**options, "attention_backend": "sliding_tile_torch"}).kernel(0)
    segments = packed((7, (6, 24, 8)), (0, (12, 16, 8)))
    q, k, v = inputs(segments, dim=8)
    assert (kernel(q, k, v, segments) - plain(q, k, v, segments)).abs().max() < 1e-5
    assert (kernel(q, k, v, segments) - sdpa.attend(q, k, v, segments)).abs().max() > 0.1
    for other in (packed((7, (1, 16, 16))), packed((0, (6, 24, 8))), packed((257, (6, 24, 8)))):
        with pytest.raises(Unsupported, match=r"st_attn knows.*this request has \d+x\d+x\d+ and \d+.*sliding_tile_torch"):
            kernel(*inputs(other, dim=8), other)


def test_block_sparse_adapter_against_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vendor(monkeypatch, "vsa", video_sparse_attn=video_sparse_attn)
    hardware = replace(GPU, capability=(9, 0), packages=frozenset({"vsa"}))
    options = {"attention_backend": "video_sparse_attn", "attention_sparsity": 0.6}
    kernel = passed(hardware, **options).kernel(0)
    plain = passed(Hardware(), **{**options, "attention_backend": "block_sparse_torch"}).kernel(0)
    assert type(kernel) is VendorBlockSparse
    segments = packed((0, (5, 8, 6)), (0, (4, 9, 13)), (0, (1, 17, 20)))
    q, k, v = inputs(segments)
    assert (kernel(q, k, v, segments) - plain(q, k, v, segments)).abs().max() < 1e-5
    assert (kernel(q, k, v, segments) - sdpa.attend(q, k, v, segments)).abs().max() > 0.1
    with_text = packed((3, (4, 4, 4)))
    with pytest.raises(Unsupported, match="3 text tokens attend together.*block_sparse_torch"):
        kernel(*inputs(with_text), with_text)


def test_a_broken_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = replace(GPU, capability=(9, 0), packages=frozenset({"flash_attn"}))
    vendor(monkeypatch, "flash_attn")
    with pytest.raises(Unsupported, match="flash-attn that fits this torch, as the one here has no flash_attn_varlen_func; use"):
        passed(hardware, attention_backend="fa")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # what Python keeps of an import that must fail
    with pytest.raises(Unsupported, match="as the one here can't be imported .ModuleNotFoundError.*use 'torch_sdpa'"):
        passed(hardware, attention_backend="fa")


def test_a_library_of_another_version_is_refused_at_start_and_not_by_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    vendor(monkeypatch, "vsa", video_sparse_attn=lambda q, k, v, topk, block_size, compress_attn_weight=None: q)  # its first
    hardware = replace(GPU, capability=(9, 0), packages=frozenset({"vsa"}))
    with pytest.raises(Unsupported, match="vsa .* is of a version whose video_sparse_attn takes no variable_block_sizes"):
        passed(hardware, attention_backend="video_sparse_attn")


@pytest.mark.parametrize(("name", "module", "capability", "dim"), [
    ("sage_attn", "sageattention", (9, 0), 160), ("sage_attn_3", "sageattn3", (12, 0), 96), ("fa", "flash_attn", (8, 0), 36),
])  # fmt: skip
def test_head_dimensions_a_kernel_is_not_built_for(name: str, module: str, capability: tuple[int, int], dim: int) -> None:
    hardware = replace(GPU, capability=capability, packages=frozenset({module}))
    with pytest.raises(Unsupported, match=f"{name}.*head dimensions.*{dim}; use 'torch_sdpa'"):
        passed(hardware, dim, attention_backend=name)


def test_auto_does_without_a_broken_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    both = replace(GPU, capability=(9, 0), packages=frozenset({"flash_attn", "flash_attn_interface"}))
    vendor(monkeypatch, "flash_attn", flash_attn_varlen_func=fa2)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    kernel = passed(both).kernel(0)
    assert isinstance(kernel, VarlenAttention) and kernel.function is fa2 and not caplog.text  # the next best
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    for flags in ({}, {"attention_backend": "auto"}, {"component_attention_backends": {"transformer": "auto"}}):
        caplog.clear()
        assert passed(both, **flags).kernel(0) is sdpa.attend_cudnn
        assert "attention backend torch_sdpa: fa needs an install of" in caplog.text and "can't be imported" in caplog.text


def test_auto_does_without_kernels_not_built_for_the_heads(caplog: pytest.LogCaptureFixture) -> None:
    assert passed(replace(GPU, capability=(8, 0), packages=frozenset({"flash_attn"})), 36).kernel(0) is sdpa.attend
    assert "torch_sdpa: fa needs head dimensions of multiples of 8 up to 256 instead of 36" in caplog.text


@pytest.mark.parametrize(("name", "module"), [("sliding_tile_attn", "st_attn"), ("video_sparse_attn", "vsa")])
def test_vendors_patterns_need_a_model_that_fits_them(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = replace(GPU, capability=(9, 0), packages=frozenset({module}))
    windows = {"sliding_tile_window": "3,3,3"} if name == "sliding_tile_attn" else {}
    for spec in (DEV, SCHNELL):
        with pytest.raises(Unsupported, match=f"'{name}': not for this model: the library {module} .*; use '"):
            passed(hardware, patterns=frozenset(spec.vendor_patterns), attention_backend=name, **windows)
    vendor(monkeypatch, module, sliding_tile_attention=sliding_tile_attention, video_sparse_attn=video_sparse_attn)
    passed(hardware, attention_backend=name, **windows)


def test_torch_sdpa_asks_for_cudnn_on_hopper_only() -> None:
    for hardware, flags, kernel in (
        (replace(GPU, capability=(9, 0)), {}, sdpa.attend_cudnn),
        (replace(GPU, capability=(9, 0)), {"dit_precision": "fp32"}, sdpa.attend),
        (replace(GPU, capability=(8, 0)), {}, sdpa.attend),
        (replace(GPU, capability=(9, 4), rocm=True), {}, sdpa.attend),
        (Hardware(), {}, sdpa.attend),
    ):
        assert passed(hardware, **flags).kernel(0) is kernel


# ------------------------------------------------------------------------------------------------------- layers by pattern
def test_patterns_choose_layers_and_the_last_one_wins() -> None:
    parts = {"transformer": "blocked", "transformer.blocks.1*": "block_sparse_torch", "transformer.blocks.11": "torch_sdpa",
             "transformer.blocks.3.attention": "torch_sdpa"}  # fmt: skip
    model = passed(Hardware(), component_attention_backends=parts)
    sparse = [layer for layer in range(12) if isinstance(model.kernel(layer), BlockSparse)]
    plain = [layer for layer in range(12) if model.kernel(layer) is sdpa.attend]
    assert (sparse, plain) == ([1, 10], [3, 11])


@pytest.mark.parametrize(("pattern", "nearest"), [
    ("transformer.blocks.99", "transformer.blocks."), ("transformer.block.1", "transformer.blocks.1"),
    ("transformer.", "transformer"),
])  # fmt: skip
def test_a_pattern_that_matches_nothing(pattern: str, nearest: str) -> None:
    with pytest.raises(StepwellError, match=f"'{pattern}' matches no attention layer of this model; the nearest is '{nearest}"):
        passed(Hardware(), component_attention_backends={pattern: "torch_sdpa"})


def test_each_layer_and_head_has_its_windows_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mask.json"
    table = {f"{t}_{layer}_{h}": [1, 1 + layer, 1 + h + t] for t in range(2) for layer in range(12) for h in range(HEADS)}
    file.write_text(json.dumps(table))
    model = passed(Hardware(), attention_backend="sliding_tile_torch", mask_strategy_file_path=str(file))
    for layer in (0, 7, 11):
        kernel = model.kernel(layer)
        assert isinstance(kernel, SlidingTile) and isinstance(kernel.windows, partial)
        assert kernel.windows(0, 4) == ((1, 1 + layer, 1), (1, 1 + layer, 2))
        assert kernel.windows(3, 4) == ((1, 1 + layer, 2), (1, 1 + layer, 3))
    table.pop("1_11_1")
    file.write_text(json.dumps(table))
    with pytest.raises(StepwellError, match="key '1_11_1' is missing"):
        passed(Hardware(), attention_backend="sliding_tile_torch", mask_strategy_file_path=str(file))

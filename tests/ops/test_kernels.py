"""Triton kernels against their torch twins: on a GPU where there is one, else under Triton's interpreter.

That they also compile is checked for two generations of GPUs without one, down to the machine code.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from stepwell.models.flux import DEV, Flux, FluxConfig
from stepwell.ops.packing import JointLayout, Lane
from stepwell.ops.rows import PLAIN, TOLERANCE, RowKernels, RowMaths, largest_difference
from stepwell.ops.spans import Span, SpanLayout
from stepwell.ops.spans import largest_difference as spans_differ
from stepwell.stages.text import Conditioning

triton = pytest.importorskip("triton", reason="Triton is not installed here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = [[(1, 1)], [(3, 4)], [(2, 1), (1, 3), (1, 3)]]  # text and image tokens
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels() -> RowKernels:
    from stepwell.ops.kernels.rows import KERNELS

    return KERNELS


def layout_of(pairs: list[tuple[int, int]]) -> JointLayout:
    return JointLayout([Lane(None, 1, text, (1, 1, image)) for text, image in pairs])


def close(got: Tensor, wanted: Tensor) -> None:
    """`wanted` is in float64; what is got may differ by the rounding of its own dtype."""
    assert got.shape == wanted.shape
    assert (got.double() - wanted).abs().max() <= TOLERANCE[got.dtype] * wanted.abs().max()


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 129])
def test_norms_and_gates(kernels: RowKernels, pairs: list[tuple[int, int]], dtype: torch.dtype, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = layout_of(pairs).joint
    wide = torch.randn(segments.total, channels + 3, generator=generator).to(DEVICE, dtype)
    x, update = wide[:, :channels], torch.randn(segments.total, channels, generator=generator).to(DEVICE, dtype)
    table = torch.randn(len(pairs), 3, channels, generator=generator).to(DEVICE, dtype)
    gate, shift, scale = (table[0] if len(pairs) == 1 else table).unbind(-2)  # rows of a step's table: with a stride
    before = x.clone()

    owners = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(segments.lengths)).to(DEVICE)
    rows = table.double()[owners].unbind(-2)

    def norm(value: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(value, (channels,), eps=1e-6) * rows[2] + rows[1]

    close(kernels.modulated_norm(x, shift, scale, segments), norm(x.double()))
    total, normed = kernels.gated_add_norm(x, gate, update, shift, scale, segments)
    close(total, x.double() + rows[0] * update.double())
    close(normed, norm(total.double()))
    assert torch.equal(x, before)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 6), (2, 24)])
@pytest.mark.parametrize("streams", [1, 2])
def test_norm_and_rotation(
    kernels: RowKernels, pairs: list[tuple[int, int]], dtype: torch.dtype, heads: int, head_dim: int, streams: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = layout_of(pairs)
    tokens = layout.joint.total
    queries_keys = torch.randn(tokens, 3, heads, head_dim, generator=generator).to(DEVICE, dtype)[:, :2]
    weights = tuple(torch.randn(2, 1, head_dim, generator=generator).to(DEVICE) for _ in range(streams))
    angle = torch.randn(tokens, head_dim // 2, generator=generator).to(DEVICE)
    rotary = torch.polar(torch.ones_like(angle), angle)

    x = queries_keys.double()
    kinds = [kind for text, image in pairs for kind in [0] * text + [-1] * image]
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.stack([weights[kind].double() for kind in kinds])
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rotary.to(torch.complex128)[:, None, None]
    close(kernels.norm_rotate(queries_keys, weights, rotary, layout), torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_company(kernels: RowKernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    together, alone = layout_of([(2, 5), (3, 4)]), layout_of([(3, 4)])
    x, update = torch.randn(2, 14, 40, generator=generator).to(DEVICE, dtype)
    gate, shift, scale = torch.randn(3, 2, 40, generator=generator).to(DEVICE, dtype)
    both = kernels.gated_add_norm(x, gate, update, shift, scale, together.joint)
    one = kernels.gated_add_norm(x[7:], gate[1], update[7:], shift[1], scale[1], alone.joint)
    assert all(torch.equal(b[7:], o) for b, o in zip(both, one, strict=True))


def test_the_trial_at_load_passes_them_and_finds_a_wrong_one(kernels: RowKernels) -> None:
    assert largest_difference(kernels, 3, 8, torch.bfloat16, DEVICE) <= 1
    wrong = RowKernels(
        lambda x, shift, scale, segments: PLAIN.modulated_norm(x, shift, scale * 1.001, segments),
        kernels.gated_add_norm,
        kernels.norm_rotate,
    )
    assert largest_difference(wrong, 3, 8, torch.float32, DEVICE) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "keys", "head_dim", "size"), [(4, 2, 16, 8), (3, 3, 24, 4), (6, 1, 40, 20)])
def test_attention_of_texts(dtype: torch.dtype, heads: int, keys: int, head_dim: int, size: int) -> None:
    from stepwell.ops.kernels.spans import span_attention

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter takes the bits of bfloat16 for whole numbers in tl.dot; float16 goes the same way")
    generator = torch.Generator().manual_seed(0)
    spans = [Span(range(2 * size), (3, 1)), Span(range(size)), Span(range(3 * size), (2,)), Span(range(size), (0, 4, 2))]
    layout = SpanLayout(spans, size, torch.device(DEVICE))
    rows = sum(len(span.ids) for span in spans)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    qkv = random(rows, heads + 2 * keys, head_dim)  # values lie within it, with a stride
    q, k, v = qkv.split((heads, keys, keys), dim=1)
    pool = random(2, 5, size, keys, head_dim)
    got = span_attention(q, k, v, pool, layout)
    start = 0
    for span in spans:
        past = pool.double()[:, list(span.pages)].flatten(1, 2)
        own = slice(start, start + len(span.ids))
        seen = [
            torch.cat((kept, new.double()[own])).repeat_interleave(heads // keys, 1)
            for kept, new in zip(past, (k, v), strict=True)
        ]
        blocks = torch.arange(len(span.ids), device=DEVICE) // size
        mask = torch.arange(len(seen[0]), device=DEVICE) < (len(past[0]) + (blocks + 1) * size)[:, None]
        scores = torch.einsum("qhd,khd->hqk", q.double()[own], seen[0]) * head_dim**-0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        close(got[own], torch.einsum("hqk,khd->qhd", weights, seen[1]).flatten(1))
        alone = span_attention(q[own], k[own], v[own], pool, SpanLayout([span], size, torch.device(DEVICE)))
        assert torch.equal(alone, got[own])
        start = own.stop
    assert spans_differ(span_attention, (heads, keys), head_dim, size, pool) <= 1
    assert spans_differ(lambda *given: span_attention(*given) * 1.1, (heads, keys), head_dim, size, pool) > 1


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stepwell.ops.kernels import rows, spans

POINTERS = {"rotary": "*fp32", "text_weight": "*fp32", "image_weight": "*fp32", "owners": "*i64", "kinds": "*i64", "eps": "fp32"}
VALUES = {name: "*bf16" for name in ("x", "update", "gate", "shift", "scale", "total", "out")}
VALUES |= {name: "*bf16" for name in ("q", "k", "v", "pool_k", "pool_v", "made")}
POINTERS |= {"pages": "*i64", "table": "*i64", "factor": "fp32"}
SIZES = {"BLOCK": 4096, "HEADS": 32, "HALF": 64, "ROWS": 32, "WIDTH": 128}
for kernel in (rows.modulated_norm_kernel, rows.gated_add_norm_kernel, rows.norm_rotate_kernel, spans.span_attention_kernel):
    kinds = {**POINTERS, **VALUES, **{name: "constexpr" for name in SIZES}}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    constants = {name: size for name, size in SIZES.items() if name in signature}
    for capability in (80, 90):
        made = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", capability, 32))
        print(kernel.__name__, capability, len(made.asm["cubin"]))
"""


def test_kernels_compile_for_gpus() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 8 and all(int(size) > 1000 for *_, size in lines)


@torch.no_grad()
def test_a_model_with_fused_kernels_predicts_the_same(kernels: RowKernels) -> None:
    torch.manual_seed(0)
    config = {**DEV.tiny, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "attention_head_dim": 12,
              "axes_dims_rope": [4, 4, 4]}  # fmt: skip
    model = Flux(FluxConfig.from_json(config)).eval().to(DEVICE)
    lanes = []
    for text, grid in ((3, (1, 2)), (2, (2, 2)), (2, (2, 2))):
        prepared = model.prepare(Conditioning(torch.randn(text, 32), torch.randn(24)), torch.tensor([700.0]), (1, *grid), 3.5)
        lanes.append(Lane(prepared, 1, text, (1, *grid)))
    latents = torch.randn(10, 16).to(DEVICE)
    for some, rows in ((lanes, slice(None)), (lanes[:1], slice(2))):
        packed = model.pack(some)
        wanted = model(latents[rows], packed)
        for module in model.modules():
            if isinstance(module, RowMaths):
                module.kernels = kernels
        got = model(latents[rows], packed)
        assert 0 < (got - wanted).abs().max() <= 1e-5
        for module in model.modules():
            if isinstance(module, RowMaths):
                module.kernels = PLAIN

"""The maths under the models, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stepwell.ops.attention import Attention
from stepwell.ops.backends import blocked, sdpa
from stepwell.ops.blocks import Blocks
from stepwell.ops.linear import BySegment, LinearGelu, PackedLinear, is_row_invariant
from stepwell.ops.modulate import gated_add, modulated_norm
from stepwell.ops.norm import rms_norm
from stepwell.ops.packing import JointLayout, Lane, Segments
from stepwell.ops.rope import rotary_table, rotate

LENGTHS = [[7], [4, 4, 4], [5, 5, 9, 2, 2], [600, 3]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), [
    (sdpa.attend, torch.float32, 1e-6), (blocked.attend, torch.float32, 1e-6), (blocked.attend, torch.bfloat16, 1e-2),
])  # fmt: skip
def test_attention_stays_inside_each_sequence(lengths: list[int], kernel: object, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 3, 16, generator=generator).to(dtype) for _ in range(3))
    out = kernel(q, k, v, Segments(lengths))  # type: ignore[operator]
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        q1, k1, v1 = (t[rows].double().transpose(0, 1) for t in (q, k, v))
        wanted = (torch.softmax(q1 @ k1.transpose(1, 2) / 4, -1) @ v1).transpose(0, 1).flatten(1)
        assert (out[rows].double() - wanted).abs().max() < tolerance
        start += length


@pytest.mark.parametrize("lengths", LENGTHS)
def test_modulation_and_gates_per_sequence(lengths: list[int]) -> None:
    x, update = torch.randn(sum(lengths), 8), torch.randn(sum(lengths), 8)
    shift, scale, gate = (torch.randn(len(lengths), 8) for _ in range(3))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    segments = Segments(lengths)
    wanted = F.layer_norm(x, (8,), eps=1e-6) * scale[owner] + shift[owner]
    vectors = (shift, scale, gate) if len(lengths) > 1 else (shift[0], scale[0], gate[0])
    before = x.clone()
    assert torch.allclose(modulated_norm(x, vectors[0], vectors[1], segments), wanted, atol=1e-5)
    assert torch.allclose(gated_add(x, vectors[2], update, segments), x + gate[owner] * update, atol=1e-5)
    assert torch.equal(x, before)


def test_joining_and_taking_apart() -> None:
    text_lengths, image_lengths = [2, 2, 3, 3, 3], [4, 4, 4, 5, 5]
    layout = JointLayout([Lane(None, 1, t, (1, 1, i)) for t, i in zip(text_lengths, image_lengths, strict=True)])
    text, image = torch.randn(sum(text_lengths), 3), torch.randn(sum(image_lengths), 3)
    joint = layout.join(text, image)
    parts = zip(text.split(text_lengths), image.split(image_lengths), strict=True)
    assert torch.equal(joint, torch.cat([torch.cat(pair) for pair in parts]))
    assert torch.equal(layout.text_of(joint), text) and torch.equal(layout.image_of(joint), image)


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, LinearGelu])
def test_packed_linears(rows: int, dtype: torch.dtype, kind: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    plain = kind(48, 80).to(dtype)
    x = torch.randn(rows, 48).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        assert (PackedLinear(plain)(x) - plain(x)).abs().max() < tolerance


def test_a_layer_that_sums_by_row_count_is_found_out() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order = torch.arange(self.in_features) if len(x) < 100 else torch.arange(self.in_features).flip(0)
            total = torch.zeros(len(x), self.out_features)
            for i in order.tolist():
                total = total + x[:, i, None] * self.weight[:, i]
            return total

    assert not is_row_invariant(Odd(8, 4), torch.float32, lambda layer: layer)
    assert is_row_invariant(nn.Linear(48, 16, device="meta"), torch.float32, PackedLinear)


@torch.no_grad()
def test_a_layer_by_segment_sees_the_rows_each_sequence_has_alone() -> None:
    class RowCount(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + len(x)

    split, x = BySegment(RowCount()), torch.randn(7, 3)
    parts = [part + len(part) for part in x.split([4, 1, 2])]
    assert torch.equal(split(x, Segments([4, 1, 2])), torch.cat(parts))
    assert torch.equal(split(x, Segments([7])), x + 7)


def test_rotation_and_norm_against_diffusers() -> None:
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    positions = torch.randint(0, 50, (11, 3)).float()
    x = torch.randn(11, 2, 16)
    reference = apply_rotary_emb(x[None], FluxPosEmbed(10_000, [4, 6, 6])(positions), sequence_dim=1)[0]
    assert torch.allclose(rotate(x, rotary_table(positions, (4, 6, 6))), reference, atol=1e-5)
    assert torch.allclose(rms_norm(x), F.rms_norm(x, (16,), eps=1e-6), atol=1e-6)


def test_the_seams_take_what_a_pass_puts_there() -> None:
    attention = Attention()
    attention.kernel = lambda q, k, v, segments: q.flatten(1) * 2
    assert torch.equal(attention(*[torch.ones(2, 1, 3)] * 3, Segments([2])), torch.full((2, 3), 2.0))

    class Add(nn.Module):
        def forward(self, x: int, call: int) -> int:
            return x + call

    blocks = Blocks([Add(), Add()])
    assert blocks(1, 10) == 21
    blocks.runner = lambda all_blocks, x, call: len(all_blocks)
    assert blocks(1, 10) == 2

"""The text side of the bundled Wan model: a T5 tokenizer over one small vocabulary and a small UMT5 encoder.

    python -m training.video_text --output runs/video-text --steps 1500

Taught alone to say from every token what a prompt states (see `training.text`). UMT5 is given the padding's mask and WanPipeline
puts zeros in place of padding, so what it makes of a prompt does not depend on the padded length.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from training.moving import ATTRIBUTES, Caption, describe, sample_motion, vocabulary
from training.optimizer import Optimizers
from training.text import Heads, t5_tokenizer, targets

WIDTH = 64


def umt5_model(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def read_prompts(tokenizer: T5TokenizerFast, encoder: UMT5EncoderModel, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(texts, tokens, width) outputs, zero where padded, and the mask (texts, tokens), padded to the longest of the texts"""
    tokens = tokenizer(texts, padding="longest", return_tensors="pt")
    mask = tokens.attention_mask
    return encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None], mask.bool()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(3)
    tokenizer = t5_tokenizer(vocabulary())
    parts = nn.ModuleDict({"encoder": umt5_model(tokenizer), "heads": Heads(WIDTH, ATTRIBUTES)})
    print("parameters", sum(p.numel() for p in parts["encoder"].parameters()), flush=True)
    optimizers = Optimizers(parts, args.steps, muon_lr=0.02, adam_lr=3e-3, adam_only=("embed", "shared", "heads", "bias"))
    for step in range(args.steps):
        captions = [describe(sample_motion(rng), rng) for _ in range(96)] + [Caption("")] * 2
        hidden, mask = read_prompts(tokenizer, parts["encoder"], [caption.text for caption in captions])
        wanted = {name: value[:, None].expand(mask.shape)[mask] for name, value in targets(captions, ATTRIBUTES).items()}
        loss, right = parts["heads"].loss(hidden[mask][:, None], wanted)
        loss.backward()
        optimizers.step(step)
        if step % 100 == 0 or step == args.steps - 1:
            print(f"{step} loss {loss.item():.4f} tokens read right {right:.4f}", flush=True)
    tokenizer.save_pretrained(args.output / "tokenizer")
    parts["encoder"].save_pretrained(args.output / "text_encoder")


if __name__ == "__main__":
    main()

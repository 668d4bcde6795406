"""The text side of the bundled FLUX model: CLIP and T5 tokenizers over one small vocabulary, and small encoders.

    python -m training.text --output runs/text --steps 3000

The encoders are taught first, alone, to say what a prompt states (count, shape, colour, background, size, place):
CLIP from its pooled vector, T5 from every token it returns, padding included, at padded lengths from 16 to 512.
The denoiser is then trained on frozen encoders whose outputs already carry the attributes linearly.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from training.optimizer import Optimizers
from training.shapes import COLORS, PLACES, SHAPES, SIZES, Caption, describe, sample_scene, vocabulary

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
MARKS = list("0123456789,.-")
ATTRIBUTES = {
    "count": (1, 2, 3),
    "shape": SHAPES,
    "color": tuple(COLORS),
    "background": tuple(COLORS),
    "size": SIZES,
    "place": PLACES,
}
# T5 pads to a length the caller chooses (512 by default): every length must work, short ones are the common case.
LENGTHS, LENGTH_WEIGHTS = (16, 24, 32, 64, 128, 256, 512), (0.3, 0.2, 0.2, 0.12, 0.08, 0.05, 0.05)


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which each word of the vocabulary is one token and anything else is spelt."""
    tokenizer = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    split = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=LETTERS + MARKS,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(vocabulary())] * 4 + [" ".join(LETTERS + MARKS)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens = [t for t, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if not t.startswith("<|")]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # end-of-text has the highest id, as in CLIP: pooling looks for it
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def t5_tokenizer(known: list[str]) -> T5TokenizerFast:
    """A unigram tokenizer in which each known word is one token and anything else is spelt."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    words = dict.fromkeys(form for word in known for form in (word, word.capitalize()))  # T5 keeps case
    vocab += [("▁" + word, -2.0) for word in words]
    vocab += [(char, -12.0) for char in LETTERS + MARKS]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def clip_model(tokenizer: CLIPTokenizer, width: int = 64, layers: int = 2) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_model(tokenizer: T5TokenizerFast, width: int = 64, layers: int = 2) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def tokenise(tokenizer: CLIPTokenizer | T5TokenizerFast, texts: list[str], length: int) -> Tensor:
    """(texts, length) token ids, padded as FluxPipeline pads them"""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def targets(captions: Sequence[Any], attributes: dict[str, tuple] = ATTRIBUTES) -> dict[str, Tensor]:
    """For each attribute the class each caption states, 0 where it is silent."""
    out = {}
    for name, values in attributes.items():
        stated = [getattr(caption, name) for caption in captions]
        out[name] = torch.tensor([0 if value is None else 1 + values.index(value) for value in stated])
    return out


class Heads(nn.ModuleDict):
    """One linear classifier per attribute. Thrown away after training."""

    def __init__(self, width: int, attributes: dict[str, tuple] = ATTRIBUTES):
        super().__init__({name: nn.Linear(width, 1 + len(values)) for name, values in attributes.items()})

    def loss(self, features: Tensor, wanted: dict[str, Tensor]) -> tuple[Tensor, float]:
        """(batch, tokens, width) features -> summed cross entropy, and the share of captions read wholly right"""
        total, right = features.new_zeros(()), torch.ones(features.shape[:2], dtype=torch.bool)
        for name, head in self.items():
            logits = head(features)  # (batch, tokens, classes)
            wanted_everywhere = wanted[name][:, None].expand(features.shape[:2])
            total = total + nn.functional.cross_entropy(logits.flatten(0, 1), wanted_everywhere.flatten())
            right &= logits.argmax(-1) == wanted_everywhere
        return total, right.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = random.Random(3)

    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer(vocabulary())
    clip, t5 = clip_model(tokenizer), t5_model(tokenizer_2)
    parts = nn.ModuleDict({"clip": clip, "t5": t5, "clip_heads": Heads(64), "t5_heads": Heads(64)})
    optimizers = Optimizers(parts, args.steps, muon_lr=0.02, adam_lr=3e-3, adam_only=("embed", "shared", "heads", "bias"))
    for step in range(args.steps):
        length = rng.choices(LENGTHS, LENGTH_WEIGHTS)[0]
        batch = max(8, 4096 // (length + 32))
        captions = [describe(sample_scene(rng), rng) for _ in range(batch)] + [Caption("")] * 2
        texts, wanted = [caption.text for caption in captions], targets(captions)
        pooled = clip(tokenise(tokenizer, texts, 77)).pooler_output
        hidden = t5(tokenise(tokenizer_2, texts, length)).last_hidden_state
        clip_loss, clip_right = parts["clip_heads"].loss(pooled[:, None], wanted)
        t5_loss, t5_right = parts["t5_heads"].loss(hidden, wanted)
        (clip_loss + t5_loss).backward()
        optimizers.step(step)
        if step % 100 == 0 or step == args.steps - 1:
            read = f"clip {clip_right:.3f}, t5 {t5_right:.3f}"
            print(f"{step} length {length} losses {clip_loss.item():.3f} {t5_loss.item():.3f} read right {read}", flush=True)
    tokenizer.save_pretrained(args.output / "tokenizer")
    tokenizer_2.save_pretrained(args.output / "tokenizer_2")
    clip.save_pretrained(args.output / "text_encoder")
    t5.save_pretrained(args.output / "text_encoder_2")


if __name__ == "__main__":
    main()

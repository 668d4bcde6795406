"""Train the bundled text model: block diffusion with noise, so that it also corrects what is written.

    python -m training.train_llada --output runs/llada --steps 4500          # about 40 minutes on one core; --resume

A sequence is the noisy copy of the answer's blocks, then the clean blocks before its last: a noisy block sees itself and clean
blocks before it (LLaDA2.0 report §3, "block diffusion"). Each block has its own share of masks; some of the tokens that are not
masked are replaced, at random or later by what the model itself would have written; and what is right is to be kept (LLaDA2.1
report §3, mask-to-token and token-to-token). Sequences of a batch have one layout, so that nothing is padded.
Everything is seeded; rates are scheduled by the step count.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.stages.tokens import rendered
from training import state
from training.llada import BLOCK, CONFIG, SPECIALS, Llada, tokenizer
from training.optimizer import Optimizers
from training.words import Example, sample, tale

BLOCKS = (BLOCK, BLOCK, BLOCK, BLOCK // 2)  # sizes trained on, so that a request's size is a matter of taste
SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "You are tiny-llada.")
NOISE = 0.1  # of the tokens that are not masked
KEEP_WEIGHT = 0.2  # of the loss of tokens that are right already
PLAIN_SHARE = 0.08  # of the sequences
OWN_SHARE = 0.3  # of the batches, once there are mistakes of its own
BALANCE = 1e-3


@dataclass(frozen=True)
class Layout:
    """Blocks of `size` tokens: `first` is the one in which the answer begins, `last` the one in which it ends."""

    size: int
    first: int
    last: int

    @property
    def noisy(self) -> int:
        """Tokens of the noisy copy."""
        return (self.last + 1 - self.first) * self.size

    @property
    def tokens(self) -> int:
        return self.noisy + self.last * self.size

    def positions(self) -> Tensor:
        whole = torch.arange((self.last + 1) * self.size)
        return torch.cat((whole[self.first * self.size :], whole[: self.last * self.size]))

    def mask(self) -> Tensor:
        """(tokens, tokens), True where a query sees a key"""
        block = self.positions() // self.size
        clean = torch.arange(self.tokens) >= self.noisy
        q, k, is_clean = block[:, None], block[None], clean[None]
        return torch.where(is_clean, torch.where(clean[:, None], q >= k, q > k), (q == k) & ~clean[:, None])


@dataclass(frozen=True)
class Batch:
    """ids: (batch, tokens) of whole sequences; given: (batch, tokens of the noisy copy), True where the prompt is."""

    layout: Layout
    ids: Tensor
    given: Tensor


class Drawing:
    """Examples as token ids, collected until a batch of one layout is full."""

    def __init__(self, rng: random.Random, tokens: int):
        self.rng, self.most = rng, tokens
        self.encode = tokenizer().encode
        self.waiting: dict[Layout, list[tuple[list[int], int]]] = {}

    def example(self) -> tuple[list[int], int]:
        """Ids of prompt and answer, and how many are the prompt's."""
        rng = self.rng
        example = sample(rng)
        if rng.random() < PLAIN_SHARE:  # no conversation: a text to go on with, from anywhere
            if rng.random() < 0.5:
                text = tale(rng)
                given = text.index(" there") if rng.random() < 0.5 else rng.randrange(len(text))
            else:
                text = example.answer
                given = rng.randrange(len(text))
            begun = len(self.encode(text[:given], add_special_tokens=False))  # tokens are bytes
            return [*self.encode(text, add_special_tokens=False), self.encode(SPECIALS[0])[0]], begun
        turns = []
        if rng.random() < 0.06:
            turns.append({"role": "system", "content": rng.choice(SYSTEMS)})
        while rng.random() < 0.1:
            turns += turns_of(sample(rng))
        prompt = self.encode(rendered([*turns, *turns_of(example)[:1]], ()), add_special_tokens=False)
        return prompt + self.encode(example.answer + "<|role_end|>", add_special_tokens=False), len(prompt)

    def batch(self) -> Batch:
        while True:
            ids, given = self.example()
            size = self.rng.choice(BLOCKS)
            layout = Layout(size, given // size, (len(ids) - 1) // size)
            rows = self.waiting.setdefault(layout, [])
            rows.append((ids, given))
            if len(rows) * layout.tokens >= self.most:
                del self.waiting[layout]
                return collated(layout, rows)


def turns_of(example: Example) -> list[dict[str, str]]:
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]


def collated(layout: Layout, rows: list[tuple[list[int], int]]) -> Batch:
    """Answers go on with ends of text to the end of their last block."""
    ids = torch.full((len(rows), (layout.last + 1) * layout.size), CONFIG["eos_token_id"])
    for row, (own, _) in zip(ids, rows, strict=True):
        row[: len(own)] = torch.tensor(own)
    place = torch.arange(layout.first * layout.size, ids.shape[1])
    return Batch(layout, ids, place[None] < torch.tensor([given for _, given in rows])[:, None])


class Trainer:
    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.args = args
        self.model = Llada()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.head = nn.Identity()
        self.optimizers = Optimizers(
            self.model,
            args.steps,
            muon_lr=0.02 * args.rate,
            adam_lr=3e-3 * args.rate,
            adam_only=("norm", "lm_head", "embeddings", "gate.weight"),
        )
        self.step = 0

    def start(self) -> None:
        """To be called once the step is known."""
        rng = random.Random(f"{self.args.seed} from {self.step}")
        torch.manual_seed(rng.randrange(2**31))
        self.rng = rng
        self.drawing = Drawing(rng, self.args.tokens)

    def loss(self, b: Batch, *, own: bool) -> tuple[Tensor, Tensor]:
        """The weighted loss, and that of masks alone."""
        layout, size = b.layout, b.layout.size
        truth = b.ids[:, layout.first * size :]
        shares = torch.rand(len(truth), layout.noisy // size) * 0.9 + 0.1
        shares = torch.where(torch.rand(shares.shape) < 0.15, 1.0, shares)  # a block begins with nothing but masks
        draw = torch.rand(truth.shape)
        masked = (draw < shares.repeat_interleave(size, 1)) & ~b.given
        wrong = (torch.rand(truth.shape) < NOISE) & ~b.given & ~masked
        noisy = truth.masked_fill(masked, CONFIG["mask_token_id"])
        noisy = torch.where(wrong, torch.randint(len(SPECIALS), CONFIG["vocab_size"], truth.shape), noisy)
        clean, positions, mask = b.ids[:, : layout.last * size], layout.positions(), layout.mask()

        def logits(ids: Tensor) -> Tensor:
            return self.model(torch.cat((ids, clean), 1), positions, mask, layout.noisy)

        if own:  # some masks become what it would write there, all at once: mistakes as decoding makes them
            with torch.no_grad():
                guess = logits(noisy).argmax(-1)
            written = masked & (torch.rand(truth.shape) < torch.rand(len(truth), 1))
            noisy, masked = torch.where(written, guess, noisy), masked & ~written
            wrong = wrong | written & (guess != truth)
        losses = F.cross_entropy(logits(noisy).flatten(0, 1), truth.flatten(), reduction="none").view_as(truth)
        weights = torch.where(masked | wrong, 1.0, KEEP_WEIGHT).masked_fill(b.given, 0.0)
        return (losses * weights).sum() / weights.sum(), losses.detach()[masked].mean()

    def train_step(self) -> Tensor:
        own = self.step > 0.4 * self.args.steps and self.rng.random() < OWN_SHARE
        loss, of_masks = self.loss(self.drawing.batch(), own=own)
        loss.backward()
        self.optimizers.step(self.step)
        for gate in self.model.gates():
            gate.balance(BALANCE)
        self.step += 1
        decay = min(0.995, (1 + self.step) / (10 + self.step))
        for ours, theirs in (
            (self.average.parameters(), self.model.parameters()),
            (self.average.buffers(), self.model.buffers()),
        ):
            torch._foreach_lerp_(list(ours), list(theirs), 1 - decay)
        return torch.stack((loss.detach(), of_masks.nan_to_num()))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args(words)


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    args.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.resume:
        state.restore(trainer, args.output)
    trainer.start()
    seen, began = [], time.time()
    while trainer.step < args.steps:
        seen.append(trainer.train_step())
        if trainer.step % 50 == 0:
            loss, of_masks = torch.stack(seen).mean(0).tolist()
            pace_ms = 1000 * (time.time() - began) / len(seen)
            line = {"step": trainer.step, "loss": round(loss, 4), "masks": round(of_masks, 4), "ms": round(pace_ms)}
            print(json.dumps(line), flush=True)
            seen, began = [], time.time()
        if trainer.step % 250 == 0 or trainer.step == args.steps:
            state.save(trainer, args.output)


if __name__ == "__main__":
    main()

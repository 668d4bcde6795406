"""Train the bundled Wan-layout model on the world of moving shapes by flow matching.

    python -m training.train_wan --vae runs/video-vae --text runs/video-text --output runs/wan --steps 5000 [--resume]

One model learns to make a clip from a prompt and to continue a given first frame, the way Wan 2.2 TI2V does both: in half of the
batches the first latent frame is clean and its tokens are told time 0 (`expand_timesteps`). The encoders and the autoencoder
are frozen; latents are made once and kept in `<output>/latents.pt`. The autoencoder is causal, so a short clip is the
beginning of a long one, latents included. `--resume` goes on from `<output>/state.pt`, written every 300 steps; schedule and
randomness depend on the step count alone.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5TokenizerFast, UMT5EncoderModel

from training import state
from training.clip_latents import CELL, FRAMES_PER_LATENT, PATCH, Shape, encode_motions, frames_of, tokens_of
from training.moving import ATTRIBUTES, Motion, describe, sample_motion
from training.optimizer import Optimizers
from training.outlines import OutlineProbe
from training.own_clips import LENGTH_WEIGHTS, LENGTHS, OwnClips, make_own
from training.video_text import read_prompts

# (width, height, latent frames): how many clips are made
CLIPS = {(64, 64, 5): 2000, (64, 64, 1): 6000, (96, 64, 5): 130, (64, 96, 5): 130}
# What a step draws, by quarters of the steps: pictures teach what words mean at a fifth of the price of a clip.
SHAPES = ((64, 64, 5), (64, 64, 3), (64, 64, 1), (96, 64, 5), (64, 96, 5), (64, 64, 2))
SHARES = (
    (0.06, 0.10, 0.84, 0.0, 0.0, 0.0),
    (0.40, 0.20, 0.38, 0.01, 0.01, 0.0),
    (0.62, 0.14, 0.16, 0.03, 0.03, 0.02),
    (0.62, 0.14, 0.10, 0.05, 0.05, 0.04),
)
# Going on from a model that knows its words: pictures for outlines first, then clips
LATER_SHARES = ((0.30, 0.06, 0.60, 0.01, 0.01, 0.02), (0.55, 0.10, 0.23, 0.05, 0.05, 0.02))
COMPILED = SHAPES[:3]
KEY_SCALE = 1.5  # of the norms of cross-attention: with 1 its scores could not reach far enough, see `shun_padding`
PROBED = ("color", "background", "shape", "direction")
DROPOUT = 0.1  # of whole prompts, so that classifier-free guidance works
GUIDANCE = 0.7  # a clip follows its prompt 1 / (1 - 0.7) times as strongly as the clips drawn do
GUIDANCE_RAMP = 300  # steps until it is whole
OWN_SHARE = 0.35  # of steps, with --own; the rest are ordinary ones, whose clips all begin with a given frame
VISITED_SHARE = 0.5  # of those: latents that the model's own steps visited, else straight paths from noise to clip
VISITED_UNTIL = 0.6  # below this time what a step has to mend grows as 1 / t, and its square is weighted down
TEXT_TOKENS = 24  # more than any prompt here has
HEAD_BLOCK, SILHOUETTE_WEIGHT, NAMES_WEIGHT = 2, 0.5, 0.1
# of what the object covers, and besides of what its edge runs through, against what it does not touch: it is a tenth of a picture
OBJECT_WEIGHT, EDGE_WEIGHT = 12, 8
OUTLINE_WEIGHT, OUTLINE_UNTIL = 0.3, 0.7  # of times: above it a prediction is too vague to have outlines
LOSSES = ("flow", "silhouettes", "names", "outlines")


def build_transformer(channels: int) -> WanTransformer3DModel:
    """A new transformer that starts with almost nothing in its residual branches."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=64,
        freq_dim=256,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
    )
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, (2, 5)] = 0.2  # the gates
            block.attn2.to_out[0].weight.zero_()
            for norm in (block.attn2.norm_q, block.attn2.norm_k):
                norm.weight.fill_(KEY_SCALE)
        model.scale_shift_table.zero_()
        embedder = model.condition_embedder.text_embedder
        for layer in (embedder.linear_1, embedder.linear_2):
            layer.bias.zero_()
        for layer in (model.condition_embedder.time_proj, model.proj_out):
            layer.weight.zero_()
            layer.bias.zero_()
    return model


@torch.no_grad()
def shun_padding(model: WanTransformer3DModel, prompts: Tensor) -> None:
    """Let cross-attention begin with words (`prompts`: (words, text_dim) embeddings).

    WanPipeline pads to 512 with zeros and masks nothing, so 490 equal keys outweigh a dozen words by e^6, and attention
    that rests on padding learns nothing of words. Queries begin with a common part, keys with its opposite: small beside
    a word's key, all that a zero's key has, and the norm of keys makes it large there."""
    words = model.condition_embedder.text_embedder(prompts)
    for block in model.blocks:
        sign = torch.randint(0, 2, (words.shape[-1],)) * 2.0 - 1
        deviation = F.linear(words, block.attn2.to_k.weight).std()
        block.attn2.to_q.bias.copy_(sign)
        block.attn2.to_k.bias.copy_(-0.35 * deviation * sign)


Clips = tuple[list[Motion], Tensor, Tensor]


def make_latents(vae: AutoencoderKLWan) -> dict[Shape, Clips]:
    """Per shape: truths, and what `encode_motions` makes of them."""
    rng = random.Random(2)
    out = {}
    for shape, count in CLIPS.items():
        motions = [sample_motion(rng, shape[0] / shape[1]) for _ in range(count)]
        out[shape] = motions, *encode_motions(vae, motions, shape)
        print(f"{count} clips of {frames_of(shape)} × {shape[0]} × {shape[1]} encoded", flush=True)
    return out


class TextAttention:
    """Cross-attention to a prompt as if it were padded with zeros to some length: one zero token stands for all of them, with
    the logarithm of their number added to its score. The same result as with all of them, at a fraction of the price."""

    bias: Tensor  # (batch, 1, 1, tokens + 1)

    def __call__(self, attn: WanAttention, x: Tensor, text: Tensor, mask: None = None, rotary: None = None) -> Tensor:
        query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        query, key, value = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias.to(query.dtype))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def padding_bias(mask: Tensor, length: int | Tensor) -> Tensor:
    """(batch, tokens) -> (batch, 1, 1, tokens + 1) scores to add for a text padded to `length`, or to lengths (batch,)"""
    missing = length - mask.sum(1)
    scores = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return torch.cat([scores, torch.log(missing[:, None].float())], 1)[:, None, None]


def object_weight(silhouettes: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(clips, tokens, cells) of clips of `shape` -> (clips, 1, frames, rows, columns) of their latents"""
    width, height, _ = shape
    side = PATCH // CELL // 2
    cells = silhouettes.unflatten(-1, (FRAMES_PER_LATENT, 2, side, 2, side)).mean((2, 4, 6))  # (clips, tokens, 2, 2)
    grid = cells.unflatten(1, (-1, height // PATCH, width // PATCH)).permute(0, 1, 2, 4, 3, 5)
    covered = grid.flatten(4).flatten(2, 3)[:, None]
    return 1 + OBJECT_WEIGHT * covered + 4 * EDGE_WEIGHT * covered * (1 - covered)


class Head(nn.Module):
    """Reads from a middle block's tokens where the object is and what the clip shows, and says how wrong that is. Only training
    has it: the flow's loss hardly pays for the object, so without it a transformer learns words last."""

    def __init__(self, block: nn.Module, width: int, cells: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cells = nn.Linear(width, cells)
        self.names = nn.Linear(width, sum(map(len, ATTRIBUTES.values())))
        self.seen = torch.empty(0)
        block.register_forward_hook(lambda _, __, out: setattr(self, "seen", out))

    def loss(self, seen: Tensor, silhouettes: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
        """(clips, tokens, width), (clips, tokens, cells) in 0 … 1, and (clips, attributes), the values that clips show or -1
        -> binary cross-entropy of the cells, and cross-entropy of the names, a mean over attributes"""
        x = self.norm(seen.float())
        cells = F.binary_cross_entropy_with_logits(self.cells(x), silhouettes)
        logits = self.names(x).split([len(values) for values in ATTRIBUTES.values()], -1)
        tokens = x.shape[1]
        losses = [
            F.cross_entropy(part.flatten(0, 1), truth.repeat_interleave(tokens), ignore_index=-1)
            for part, truth in zip(logits, names.unbind(1), strict=True)
            if (truth >= 0).any()
        ]
        return cells, torch.stack(losses).mean()


def over_clip(times: Tensor) -> Tensor:
    """(clips,) -> (clips, 1, 1, 1, 1)"""
    return times[:, None, None, None, None]


def names_of(motions: list[Motion], moves: bool) -> Tensor:
    """(clips, attributes): the index of each attribute's value; -1 for those of motion, unless the clip `moves`"""
    hidden = () if moves else ("direction", "speed")
    rows = [
        [-1 if name in hidden else values.index(getattr(motion, name)) for name, values in ATTRIBUTES.items()]
        for motion in motions
    ]
    return torch.tensor(rows)


class Trainer:
    """Everything a step needs: frozen encoders, latents, the model, its average, optimizers, position."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.vae = AutoencoderKLWan.from_pretrained(args.vae).eval().requires_grad_(False)
        self.tokenizer = T5TokenizerFast.from_pretrained(args.text / "tokenizer")
        self.encoder = UMT5EncoderModel.from_pretrained(args.text / "text_encoder").eval().requires_grad_(False)
        cache = args.output / "latents.pt"
        if not cache.exists():
            torch.save(make_latents(self.vae), cache)
        self.data = torch.load(cache, weights_only=False)
        self.model = build_transformer(self.vae.config.z_dim)
        if args.initial is not None:
            self.model.load_state_dict(WanTransformer3DModel.from_pretrained(args.initial / "transformer").state_dict())
        else:
            rng = random.Random(3)
            texts = [describe(motion, rng).text for motion in self.data[64, 64, 5][0][:200]]
            text, mask = read_prompts(self.tokenizer, self.encoder, texts)
            shun_padding(self.model, text[mask])
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.text_attention = TextAttention()
        for block in self.model.blocks:
            block.attn2.set_processor(self.text_attention)
            block.forward = torch.compile(block.forward, dynamic=False)  # a step takes 0.8 s with it, 1.3 without
        self.outline = OutlineProbe(4 * self.vae.config.z_dim + 1, (PATCH // CELL) ** 2 * FRAMES_PER_LATENT, PATCH // CELL)
        _, clips, silhouettes = self.data[64, 64, 5]
        self.outline.fit(tokens_of(clips), silhouettes)
        self.head = Head(self.model.blocks[HEAD_BLOCK], 128, (PATCH // CELL) ** 2 * FRAMES_PER_LATENT)
        self.optimizers = Optimizers(
            nn.ModuleDict({"model": self.model, "head": self.head}),
            args.steps,
            muon_lr=0.03 * args.rate,
            adam_lr=2e-3 * args.rate,
            adam_only=("norm", "proj_out", "embed", "table", "head"),
        )
        self.step = 0
        self.own = self.make_own() if args.own else {}

    def make_own(self) -> dict[Shape, OwnClips]:
        """What the first weights make, kept in `<output>/own.pt`."""
        cache = self.args.output / "own.pt"
        if not cache.exists():
            scheduler = UniPCMultistepScheduler.from_pretrained(self.args.initial / "scheduler")
            torch.save(make_own(self, scheduler, self.args.own), cache)
        return torch.load(cache, weights_only=False)

    def read(self, texts: list[str], length: int | Tensor) -> tuple[Tensor, Tensor]:
        """Prompts' embeddings with one zero token more, and the scores that make it stand for all padding."""
        text, mask = read_prompts(self.tokenizer, self.encoder, texts)
        missing = TEXT_TOKENS - mask.shape[1]
        mask = F.pad(mask, (0, missing))
        return F.pad(text, (0, 0, 0, missing + 1)), padding_bias(mask, length)

    def shares(self) -> tuple[float, ...]:
        """How often a step draws each of `SHAPES` by now."""
        parts = SHARES if self.args.initial is None else LATER_SHARES[-1:] if self.own else LATER_SHARES
        return parts[min(len(parts) - 1, len(parts) * self.step // self.args.steps)]

    def batch(self) -> dict[str, Any]:
        """One draw of size, length in time and padded length, and of clips, prompts, noise and times."""
        rng = random.Random(f"batch {self.step}")
        torch.manual_seed(rng.randrange(2**31))
        shape = width, height, frames = rng.choices(SHAPES, self.shares())[0]
        motions, latents, silhouettes = self.data[shape if shape in CLIPS else (width, height, 5)]
        rows, columns = height // PATCH, width // PATCH
        tokens = frames * rows * columns
        picked = [rng.randrange(len(motions)) for _ in range(self.args.tokens // tokens)]
        texts = ["" if rng.random() < DROPOUT else describe(motions[i], rng).text for i in picked]
        x0 = latents[picked, :, :frames].float()
        count = len(picked)
        t = (torch.randperm(count) + torch.rand(count)) / count  # stratified
        if rng.random() < 0.6:  # towards noise, where the prompt decides what the clip becomes
            t = 3 * t / (1 + 2 * t)
        noised = torch.ones(1, 1, frames, 1, 1)
        if frames > 1 and (self.own or rng.random() < 0.5):  # the first frame is given
            noised[:, :, 0] = 0
        text, bias = self.read(texts, rng.choices(LENGTHS, LENGTH_WEIGHTS)[0])
        return {
            "shape": shape,
            "x0": x0,
            "trust": torch.ones(count),
            "noisy": x0 + noised * over_clip(t) * (torch.randn_like(x0) - x0),
            "noised": noised,
            "t": t,
            "text": text,
            "bias": bias,
            "silhouettes": silhouettes[picked, :tokens].float() / 255,
            "names": names_of([motions[i] for i in picked], frames > 1),
        }

    def own_batch(self, rng: random.Random) -> dict[str, Any]:
        """As `batch`, of the model's own clips: noisy latents from which straight paths lead to the mended ones."""
        torch.manual_seed(rng.randrange(2**31))
        shape = width, height, frames = rng.choices(list(self.own), [own.latents.numel() for own in self.own.values()])[0]
        own = self.own[shape]
        tokens = frames * (height // PATCH) * (width // PATCH)
        picked = [rng.randrange(len(own.texts)) for _ in range(self.args.tokens // tokens)]
        x0, count = own.latents[picked].float(), len(picked)
        u = (torch.randperm(count) + torch.rand(count)) / count
        trust = torch.ones(count)
        if rng.random() < VISITED_SHARE:
            at = (u * len(own.times)).long()
            t, noisy = own.times[at], own.visited[picked, at].float()
            trust = (t / VISITED_UNTIL).clamp(max=1).square()
        else:
            t = 3 * u / (1 + 2 * u)  # as often as the scheduler's steps
            noisy = x0 + over_clip(t) * (own.visited[picked, 0].float() - x0)
        text, bias = self.read([own.texts[i] for i in picked], own.lengths[picked])
        return {
            "shape": shape,
            "x0": x0,
            "noisy": noisy,
            "trust": trust,
            "noised": torch.ones(1, 1, frames, 1, 1),
            "t": t,
            "text": text,
            "bias": bias,
            "silhouettes": own.silhouettes[picked].float() / 255,
            "names": names_of([own.motions[i] for i in picked], frames > 1),
        }

    def predict(self, b: dict[str, Any], text: Tensor, bias: Tensor) -> Tensor:
        self.text_attention.bias = bias
        width, height, frames = b["shape"]
        told = b["noised"].expand(1, 1, frames, height // PATCH, width // PATCH).flatten()
        stance = "default" if b["shape"] in COMPILED and torch.is_grad_enabled() else "force_eager"  # compiling takes a minute
        with torch.compiler.set_stance(stance), torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return self.model(b["noisy"], 1000 * b["t"][:, None] * told, text, return_dict=False)[0].float()

    @torch.no_grad()
    def guidance(self, b: dict[str, Any], prediction: Tensor) -> Tensor:
        """What a prompt changes in a prediction, as something to add to the target: see `training.train_flux`."""
        begun = self.step - self.args.guidance_from * self.args.steps
        if begun <= 0:
            return torch.zeros(())
        text, bias = self.read([""] * len(prediction), 512)
        return GUIDANCE * min(1.0, begun / GUIDANCE_RAMP) * (prediction - self.predict(b, text, bias))

    @torch.no_grad()
    def cost_of_wrong(self, name: str) -> float:
        """How much more the flow's loss is, relative, at t = 0.9 when prompts state a wrong value of an attribute. What learning
        looks like: the loss itself hardly moves with it."""
        rng = random.Random(name)
        shape = (64, 64, 5) if name == "direction" else (64, 64, 1)
        motions, latents, silhouettes = self.data[shape]
        motions, x0 = motions[:48], latents[:48].float()
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        noised = torch.ones(1, 1, shape[2], 1, 1)
        b = {"shape": shape, "noisy": 0.1 * x0 + 0.9 * noise, "noised": noised, "t": torch.full((48,), 0.9)}
        weight = object_weight(silhouettes[:48].float() / 255, shape)
        losses = []
        for wrong in (False, True):
            told = [
                replace(m, **{name: rng.choice([v for v in ATTRIBUTES[name] if v != getattr(m, name)])}) if wrong else m
                for m in motions
            ]
            prediction = self.predict(b, *self.read([describe(m, rng, full=True).text for m in told], 512))
            losses.append(((prediction - noise + x0).square() * weight).mean())
        return float(losses[1] / losses[0] - 1)

    @torch.no_grad()
    def walk(self, b: dict[str, Any], rng: random.Random) -> None:
        """Replace noisy latents by what the model makes of noisier ones in a step or two: see `training.train_flux`."""
        count, stride = rng.choice((1, 2)), rng.choice((0.25, 0.125, 0.125))
        t = 0.12 + (0.85 - count * stride - 0.12) * torch.rand(len(b["t"])) + count * stride
        noise = b["noised"] * (b["noisy"] - b["x0"]) / over_clip(b["t"]) + b["x0"]
        b["noisy"], b["t"] = b["x0"] + b["noised"] * over_clip(t) * (noise - b["x0"]), t
        for _ in range(count):
            b["noisy"] = b["noisy"] - b["noised"] * stride * self.predict(b, b["text"], b["bias"])
            b["t"] = b["t"] - stride

    def draw(self) -> tuple[dict[str, Any], bool]:
        """A step's batch, and whether it is of the model's own clips."""
        rng = random.Random(f"walk {self.step}")
        if self.own and rng.random() < OWN_SHARE:
            return self.own_batch(rng), True
        b = self.batch()
        if rng.random() < self.args.walks:
            self.walk(b, rng)
        return b, False

    def train_step(self) -> Tensor:
        b, is_own = self.draw()
        prediction = self.predict(b, b["text"], b["bias"])
        seen = self.head.seen
        target = (b["noisy"] - b["x0"]) / over_clip(b["t"])
        if not is_own:  # what the model made has guidance in it
            target = target + self.guidance(b, prediction)
        weight = b["noised"] * object_weight(b["silhouettes"], b["shape"])
        loss = ((prediction - target).square() * weight * over_clip(b["trust"])).mean() / weight.mean()
        cells, names = self.head.loss(seen, b["silhouettes"], b["names"])
        late = b["t"] < OUTLINE_UNTIL
        estimate = b["noisy"] - b["noised"] * over_clip(b["t"]) * prediction
        outlines = self.outline.loss(tokens_of(estimate[late]), b["silhouettes"][late])
        (loss + SILHOUETTE_WEIGHT * cells + NAMES_WEIGHT * names + OUTLINE_WEIGHT * outlines).backward()
        self.optimizers.step(self.step)
        self.step += 1
        decay = min(0.997, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return torch.stack([loss.detach(), cells.detach(), names.detach(), outlines.detach()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=5200, help="tokens of video per step")
    parser.add_argument("--initial", type=Path, help="a pipeline folder to take the transformer's first weights from")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates; below 1 to go on from --initial")
    parser.add_argument(
        "--guidance-from", type=float, default=1.0, help="share of the steps after which guidance comes in; 1: never"
    )
    parser.add_argument("--walks", type=float, default=0.0, help="share of steps on latents of the model's own making; to finish")
    parser.add_argument("--own", type=int, default=0, help="how many clips --initial makes itself, to be learnt from mended")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.own and args.initial is None:
        parser.error("--own needs --initial, the model that makes the clips")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    print("parameters", sum(p.numel() for p in trainer.model.parameters()), flush=True)
    if args.resume:
        state.restore(trainer, args.output)
    began, smooth = time.time(), None
    while trainer.step < args.steps:
        losses = trainer.train_step()
        smooth = losses if smooth is None else 0.98 * smooth + 0.02 * losses
        if trainer.step % 50 == 0:
            parts = ", ".join(f"{name} {value:.4f}" for name, value in zip(LOSSES, smooth.tolist(), strict=True))
            print(f"{trainer.step} {time.time() - began:.0f} s loss of {parts}", flush=True)
        if trainer.step % 250 == 0:
            print("a wrong name costs", {name: round(trainer.cost_of_wrong(name), 4) for name in PROBED}, flush=True)
        if trainer.step % 300 == 0 or trainer.step == args.steps:
            state.save(trainer, args.output)


if __name__ == "__main__":
    main()

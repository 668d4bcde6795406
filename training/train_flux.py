"""Train the bundled FLUX.1-layout model on the world of shapes by flow matching.

    python -m training.train_flux --vae runs/vae --text runs/text --output runs/flux --steps 9000 [--resume]

The encoders are frozen (see `training.text`), so are the autoencoder and its latents, which are made once and kept in
`<output>/latents.pt`. Every step draws one picture size and one padded T5 length, and as many samples as a token
budget holds. `--resume` goes on from `<output>/state.pt`, written every 500 steps; schedule and randomness depend on the
step count alone. `training.export` makes the folder that ships from the averaged weights in `state.pt`.

To train the shipped model further, start from its folder: `--initial`, `--text` and `--vae …/vae` take it as it is.

Several processes share the gradient of each step (the token budget is per process):

    torchrun --nproc-per-node 2 -m training.train_flux …
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from training import state
from training.evaluate import accuracy
from training.latents import encode, mended, token_cells
from training.optimizer import Optimizers
from training.outlines import OutlineProbe
from training.shapes import Scene, describe, draw, sample_scene, silhouette
from training.text import tokenise

# (width, height): how many pictures, and how often a step draws them in the first and in the second half of the steps.
# Small pictures teach what words mean at a quarter of the price; large ones then teach shapes.
SIZES = {
    (64, 64): (16000, 0.50, 0.30),
    (128, 128): (9000, 0.42, 0.60),
    (96, 96): (3000, 0.02, 0.04),
    (128, 64): (1500, 0.01, 0.02),
    (64, 128): (1500, 0.01, 0.02),
    (128, 96): (1000, 0.01, 0.02),
    (96, 128): (1000, 0.01, 0.02),
}
LENGTHS, LENGTH_WEIGHTS = (16, 24, 32, 64, 128, 256, 512), (0.45, 0.15, 0.22, 0.08, 0.06, 0.02, 0.02)
DROPOUT = 0.08  # of whole prompts, so that classifier-free guidance works
GUIDANCE = 0.7  # a picture follows its prompt 1 / (1 - 0.7) times as strongly as the pictures drawn do
GUIDANCE_RAMP = 500  # steps until it is whole
CELL = 2  # pixels per cell of the silhouettes
SILHOUETTE_BLOCK, SILHOUETTE_WEIGHT = 1, 0.5
OWN_UNTIL = 0.5  # of times: above it a picture's layout is still open
STATIONS = 2  # times at which a picture of the model's own is used in a step
OWN_LENGTH_WEIGHTS = (0.15, 0.1, 0.45, 0.08, 0.06, 0.04, 0.12)  # defaults of this model and of FluxPipeline count most
OWN_FULL = 0.4  # of prompts state everything
LOSSES = ("flow", "silhouettes", "outlines")
OUTLINE_WEIGHT, OUTLINE_UNTIL = 0.3, 0.6  # of times: above it a prediction is too vague to have outlines


def build_transformer(latent_channels: int) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    modulations = [b.norm1.linear for b in transformer.transformer_blocks]
    modulations += [b.norm1_context.linear for b in transformer.transformer_blocks]
    modulations += [b.norm.linear for b in transformer.single_transformer_blocks]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
    return transformer


def make_latents(vae: AutoencoderKL) -> dict[tuple[int, int], tuple[list[Scene], Tensor]]:
    """Scenes and packed latents (pictures, tokens, channels) per size."""
    rng = random.Random(2)
    out = {}
    for (width, height), (count, *_) in SIZES.items():
        scenes = [sample_scene(rng) for _ in range(count)]
        latents = []
        for start in range(0, count, 50):
            chunk = [np.asarray(draw(s, rng, width, height)) for s in scenes[start : start + 50]]
            latents.append(encode(vae, chunk).bfloat16())
        out[width, height] = scenes, torch.cat(latents)
    return out


def make_silhouettes(patch: int) -> dict[tuple[int, int], Tensor]:
    """Per size, how far an object covers each cell of every token, in 0 … 255: (pictures, tokens, cells).

    The pictures are those of `make_latents`."""
    rng = random.Random(2)
    out = {}
    for (width, height), (count, *_) in SIZES.items():
        scenes = [sample_scene(rng) for _ in range(count)]
        size = width // CELL, height // CELL
        cells = torch.from_numpy(np.stack([np.asarray(silhouette(s, rng, *size)) for s in scenes]))
        out[width, height] = token_cells(cells, patch // CELL)
    return out


class SilhouetteHead(nn.Module):
    """Reads from a middle block's picture tokens where the objects are, and says how wrong that is. Only training has it.

    Colour dominates the flow's loss, so a transformer learns shapes last; asked for the silhouette directly it learns them at
    once, and the blocks after it use what is there. In the manner of S. Yu et al. 2024, "Representation Alignment for
    Generation", with the truth in place of a pretrained encoder.
    """

    def __init__(self, block: nn.Module, width: int, cells: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, cells)
        self.seen: Tensor | None = None
        block.register_forward_hook(lambda _, __, out: setattr(self, "seen", out[1]))

    def loss(self, silhouettes: Tensor) -> Tensor:
        """(samples, tokens, cells) in 0 … 1 -> binary cross-entropy."""
        assert self.seen is not None
        logits = self.out(self.norm(self.seen.float()))
        self.seen = None
        return F.binary_cross_entropy_with_logits(logits, silhouettes)


class Trainer:
    """Everything a step needs: frozen encoders, latents, the model, its average, optimizers, position."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.vae = AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(args.text / "tokenizer")
        self.tokenizer_2 = T5TokenizerFast.from_pretrained(args.text / "tokenizer_2")
        self.clip = CLIPTextModel.from_pretrained(args.text / "text_encoder").eval().requires_grad_(False)
        self.t5 = T5EncoderModel.from_pretrained(args.text / "text_encoder_2").eval().requires_grad_(False)
        cache = args.output / "latents.pt"
        if not cache.exists():
            torch.save(make_latents(self.vae), cache)
        self.latents = torch.load(cache, weights_only=False)
        self.model = build_transformer(self.vae.config.latent_channels)
        if args.initial is not None:
            self.model.load_state_dict(FluxTransformer2DModel.from_pretrained(args.initial / "transformer").state_dict())
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.patch = 2 ** len(self.vae.config.block_out_channels)  # pixels per token: the VAE's factor, twice
        self.silhouettes = make_silhouettes(self.patch)
        self.head = SilhouetteHead(
            self.model.single_transformer_blocks[SILHOUETTE_BLOCK], self.model.inner_dim, (self.patch // CELL) ** 2
        )
        self.outline = OutlineProbe(4 * self.vae.config.latent_channels, (self.patch // CELL) ** 2, self.patch // CELL)
        self.outline.fit(self.latents[128, 128][1], self.silhouettes[128, 128])
        self.optimizers = Optimizers(
            nn.ModuleDict({"model": self.model, "head": self.head.requires_grad_()}),
            args.steps,
            muon_lr=0.03 * args.rate,
            adam_lr=2e-3 * args.rate,
            adam_only=("norm1", "norm.linear", "norm_out", "proj_out", "embedder", "time_text_embed"),
        )
        self.step = 0

    def batch(self) -> dict[str, Tensor]:
        """One draw of size and padded length, the same in every process, and of pictures, prompts, noise and times."""
        rng = random.Random(self.step)
        half = 1 if 2 * self.step < self.args.steps else 2
        width, height = rng.choices(list(SIZES), [row[half] for row in SIZES.values()])[0]
        length = rng.choices(LENGTHS, LENGTH_WEIGHTS)[0]
        rng = random.Random(f"{self.step} {self.rank}")
        torch.manual_seed(rng.randrange(2**31))
        scenes, latents = self.latents[width, height]
        picked = [rng.randrange(len(scenes)) for _ in range(max(6, self.args.tokens // (latents.shape[1] + length)))]
        texts = ["" if rng.random() < DROPOUT else describe(scenes[i], rng).text for i in picked]
        x0 = latents[picked].float()
        count = len(picked)
        t = (torch.randperm(count) + torch.rand(count)) / count  # stratified
        if rng.random() < (0.6 if half == 1 else 0.35):  # towards noise, where the prompt decides what the picture becomes
            t = 3 * t / (1 + 2 * t)
        noise = torch.randn_like(x0)
        return {
            "x0": x0,
            "noisy": (1 - t[:, None, None]) * x0 + t[:, None, None] * noise,
            "silhouettes": self.silhouettes[width, height][picked].float() / 255,
            "t": t,
            **self.prompts(texts, length),
            **self.positions(width, height, length),
        }

    def own_batch(self) -> dict[str, Tensor]:
        """A draw of size, padded length, prompts and noise, and what the model paints of them by its own steps: at `STATIONS`
        of the late times it passes, beside what it should have arrived at, which is its own picture mended.

        So it meets the latents that painting meets, and its targets agree with them about the layout (DAgger, as `walk`). Early
        latents must not be taught so: what a picture becomes is decided there, and a model that learns this from itself
        soon makes one picture of every seed."""
        rng = random.Random(self.step)
        width, height = rng.choices(list(SIZES), [first + second for _, first, second in SIZES.values()])[0]
        length = rng.choices(LENGTHS, OWN_LENGTH_WEIGHTS)[0]
        steps = rng.choices((4, 8, 20), (0.7, 0.2, 0.1))[0]
        stride = steps // 4  # of every four stretches of the way, the stations of the last two are kept
        first = rng.randrange(stride)
        rng = random.Random(f"{self.step} {self.rank}")
        torch.manual_seed(rng.randrange(2**31))
        tokens = (width // self.patch) * (height // self.patch)
        count = max(2, self.args.tokens // STATIONS // (tokens + length))
        kept: list[int] = []
        while not kept:
            captions = [describe(sample_scene(rng), rng, full=rng.random() < OWN_FULL) for _ in range(count)]
            b = self.prompts([caption.text for caption in captions], length) | self.positions(width, height, length)
            *passed, (end, _) = self.paint(b, torch.randn(count, tokens, self.model.config.in_channels), steps)
            kept, x0, silhouettes = mended(self.vae, end, captions, (width, height), CELL)
        stations = [(x, t) for x, t in passed if t[0] <= OWN_UNTIL][first::stride]
        b |= {name: b[name][kept].repeat(STATIONS, *[1] * (b[name].ndim - 1)) for name in ("text", "pooled")}
        b |= {"x0": x0.repeat(STATIONS, 1, 1), "silhouettes": silhouettes.repeat(STATIONS, 1, 1)}
        return b | {"noisy": torch.cat([x[kept] for x, _ in stations]), "t": torch.cat([t[kept] for _, t in stations])}

    @torch.no_grad()
    def paint(self, b: dict[str, Tensor], noise: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
        """The latents and times the model passes as it paints from noise, from time 1 to 0: one more than steps."""
        x, out = noise, []
        for step in range(steps):
            t = torch.full((len(x),), 1 - step / steps)
            out.append((x, t))
            x = x - self.predict({**b, "noisy": x, "t": t}, b["text"], b["pooled"]) / steps
        return [*out, (x, torch.zeros(len(x)))]

    def prompts(self, texts: list[str], length: int) -> dict[str, Tensor]:
        return {
            "pooled": self.clip(tokenise(self.tokenizer, texts, 77)).pooler_output,
            "text": self.t5(tokenise(self.tokenizer_2, texts, length)).last_hidden_state,
        }

    def positions(self, width: int, height: int, length: int) -> dict[str, Tensor]:
        rows, columns = height // self.patch, width // self.patch
        return {
            "img_ids": FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32),
            "txt_ids": torch.zeros(length, 3),
        }

    def predict(self, b: dict[str, Tensor], text: Tensor, pooled: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # a step takes 0.39 s with it, 0.54 without
            prediction = self.model(
                hidden_states=b["noisy"],
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=b["t"],
                img_ids=b["img_ids"],
                txt_ids=b["txt_ids"],
                return_dict=False,
            )[0]
        return prediction.float()

    @torch.no_grad()
    def guidance(self, b: dict[str, Tensor], prediction: Tensor) -> Tensor:
        """What a prompt changes in a prediction, as something to add to the target: pictures then follow prompts as under
        classifier-free guidance, at the price of one forward (Z. Tang et al. 2025, "Diffusion Models without
        Classifier-free Guidance", equation 9)."""
        begun = self.step - self.args.guidance_from * self.args.steps
        if begun <= 0:
            return torch.zeros(())
        count, length = len(b["x0"]), b["text"].shape[1]
        text = self.t5(tokenise(self.tokenizer_2, [""], length)).last_hidden_state.expand(count, -1, -1)
        pooled = self.clip(tokenise(self.tokenizer, [""], 77)).pooler_output.expand(count, -1)
        return GUIDANCE * min(1.0, begun / GUIDANCE_RAMP) * (prediction - self.predict(b, text, pooled))

    @torch.no_grad()
    def walk(self, b: dict[str, Tensor], rng: random.Random) -> None:
        """Replace noisy latents by what the model makes of noisier ones in a step or two, as when it paints.

        There it meets its own mistakes, which noise never shows it; so it learns to mend them (DAgger: S. Ross et al. 2011).
        """
        count, stride = rng.choice((1, 2)), rng.choice((0.25, 0.25, 0.125))
        t = 0.12 + (0.78 - count * stride - 0.12) * torch.rand(len(b["t"])) + count * stride
        noise = (b["noisy"] - (1 - b["t"])[:, None, None] * b["x0"]) / b["t"][:, None, None]
        x = (1 - t)[:, None, None] * b["x0"] + t[:, None, None] * noise
        for _ in range(count):
            x = x - stride * self.predict({**b, "noisy": x, "t": t}, b["text"], b["pooled"])
            t = t - stride
        b["noisy"], b["t"] = x, t

    def train_step(self) -> Tensor:
        rng = random.Random(f"walk {self.step}")
        walks, own = rng.random() < self.args.walks, rng.random() < self.args.own
        b = self.own_batch() if own else self.batch()
        if walks and not own:
            self.walk(b, rng)
        prediction = self.predict(b, b["text"], b["pooled"])
        seen = self.head.seen
        target = (b["noisy"] - b["x0"]) / b["t"][:, None, None]
        if not own:  # what the model draws itself follows prompts as it should
            target = target + self.guidance(b, prediction)
        self.head.seen = seen
        loss = (prediction - target).square().mean()
        silhouette_loss = self.head.loss(b["silhouettes"])
        late = b["t"] < OUTLINE_UNTIL
        estimate = b["noisy"][late] - b["t"][late, None, None] * prediction[late]
        outline_loss = self.outline.loss(estimate, b["silhouettes"][late])
        (loss + SILHOUETTE_WEIGHT * silhouette_loss + OUTLINE_WEIGHT * outline_loss).backward()
        if self.processes > 1:
            gradients = torch.cat([p.grad.flatten() for p in self.optimizers.params])
            dist.all_reduce(gradients)
            parts = (gradients / self.processes).split([p.numel() for p in self.optimizers.params])
            for param, part in zip(self.optimizers.params, parts, strict=True):
                param.grad.copy_(part.view_as(param))
        self.optimizers.step(self.step)
        self.step += 1
        decay = min(0.996, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return torch.stack([loss.detach(), silhouette_loss.detach(), outline_loss.detach()])

    def pipeline(self) -> FluxPipeline:
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=self.vae,
            text_encoder=self.clip,
            tokenizer=self.tokenizer,
            text_encoder_2=self.t5,
            tokenizer_2=self.tokenizer_2,
            transformer=copy.deepcopy(self.average).eval(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6300)
    parser.add_argument("--tokens", type=int, default=3000, help="text and image tokens per step")
    parser.add_argument("--evaluate-every", type=int, default=2000)
    parser.add_argument("--initial", type=Path, help="a pipeline folder to take the transformer's first weights from")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates; below 1 to go on from --initial")
    parser.add_argument("--guidance-from", type=float, default=0.65, help="share of the steps after which guidance comes in")
    parser.add_argument("--walks", type=float, default=0.0, help="share of steps on latents of the model's own making; to finish")
    parser.add_argument("--own", type=float, default=0.0, help="share of steps on the model's own pictures, mended; to finish")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    trainer = Trainer(args)
    print("parameters", sum(p.numel() for p in trainer.model.parameters()), flush=True)
    if args.resume:
        state.restore(trainer, args.output)
    began, smooth = time.time(), None
    while trainer.step < args.steps:
        loss = trainer.train_step()
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        if trainer.rank > 0:
            continue
        if trainer.step % 100 == 0:
            parts = ", ".join(f"{name} {value:.4f}" for name, value in zip(LOSSES, smooth.tolist(), strict=True))
            print(f"{trainer.step} {time.time() - began:.0f} s loss of {parts}", flush=True)
        if trainer.step % 500 == 0 or trainer.step == args.steps:
            state.save(trainer, args.output)
        if trainer.step % args.evaluate_every == 0 or trainer.step == args.steps:
            for size in (64, 128):
                print(f"  {size} px:", accuracy(trainer.pipeline(), size=size, count=60), flush=True)


if __name__ == "__main__":
    main()

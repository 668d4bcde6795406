"""Wan against diffusers on a CPU: one denoising step, guided and packed, and what decoding costs in memory.

    python -m benchmarks.video [--quick] [--output FOLDER]

Random weights, same inputs, one thread, interleaved (see `benchmarks.timing`); outputs are compared too. Memory is the
growth of a process's peak while it decodes clips of n and of 2 n frames, each in a process of its own. Writes
results/<cpu>-video.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.run import DTYPES, LIMIT, as_engine, linear_calls  # noqa: E402
from benchmarks.timing import compare  # noqa: E402
from stepwell.config.hardware import host_memory  # noqa: E402
from stepwell.engine.measure import detect  # noqa: E402
from stepwell.models.wan import key_map  # noqa: E402
from stepwell.models.wan_transformer import Wan, WanConfig  # noqa: E402
from stepwell.ops.packing import Lane  # noqa: E402
from stepwell.stages.latents import Grid, Latents  # noqa: E402
from stepwell.stages.text import Conditioning  # noqa: E402
from stepwell.stages.video import WanDecoder  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A transformer's size and a step's: a grid of tokens, and a prompt of so many tokens, padded to 512."""

    name: str
    config: dict[str, Any]
    grid: Grid
    text_tokens: int
    rounds: int


CASES = {
    "tiny": Case(
        "Wan, 1.2 M, width 128, 320 + 16 tokens",
        {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 512, "num_layers": 4},
        (5, 8, 8), 16, 8,
    ),
    "wide": Case(
        "Wan, 53 M, width 1024, 1560 + 32 tokens",
        {"num_attention_heads": 8, "attention_head_dim": 128, "text_dim": 1024, "ffn_dim": 4096, "num_layers": 3},
        (1, 30, 52), 32, 4,
    ),
}  # fmt: skip


def lean(reference: WanTransformer3DModel, case: Case, precision: str) -> tuple[Wan, list[str]]:
    """Our transformer with the reference's weights, with what the engine would choose on this machine."""
    config, state = WanConfig.from_json(case.config), reference.state_dict()
    model = Wan(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict(
        {
            name: torch.cat([state[key].reshape(-1, *shapes[name][1:]) for key in keys])
            for name, keys in key_map(case.config).items()
        }
    )
    return model, as_engine(model, config.num_attention_heads, config.attention_head_dim, precision)


@torch.no_grad()
def one_step(case: Case, precision: str) -> dict[str, Any]:
    """One forward, and both branches of a guided step: in turn by diffusers, packed by us."""
    torch.manual_seed(0)
    reference = WanTransformer3DModel(**case.config).eval().to(DTYPES[precision])
    model, chosen = lean(reference, case, precision)
    latents = Latents(16, 8, 1.0, 0.0, frame_factor=4)
    frames, rows, columns = case.grid
    clip = torch.randn(16, frames, 2 * rows, 2 * columns)
    states = torch.randn(2, case.text_tokens, case.config["text_dim"]).to(DTYPES[precision])
    padding = 512 - case.text_tokens
    padded = torch.nn.functional.pad(states, (0, 0, 0, padding))
    timestep = torch.tensor([500])

    def theirs(branch: int) -> Tensor:
        video = clip[None].to(DTYPES[precision])
        predicted: Tensor = reference(video, timestep, padded[branch : branch + 1], return_dict=False)[0]
        return predicted

    branches = [Conditioning(state, state.new_zeros(0), padding) for state in states]
    lanes = [Lane(model.prepare(b, torch.tensor([500.0]), case.grid, 0.0), 1, 0, case.grid) for b in branches]
    alone, both = model.pack(lanes[:1]), model.pack(lanes)
    x = latents.pack(clip).to(DTYPES[precision])
    twice = torch.cat((x, x))
    wanted = latents.pack(theirs(0)[0])
    error = ((model(x, alone) - wanted).float().norm() / wanted.float().norm()).item()
    assert error < (1e-4 if precision == "fp32" else 3e-2), error
    linears = linear_calls(model, lambda: model(x, alone))
    single: dict[str, Callable[[], object]] = {
        "diffusers eager": lambda: theirs(0),
        "stepwell": lambda: model(x, alone),
        LIMIT: lambda: [layer(rows) for layer, rows in linears],
    }
    guided: dict[str, Callable[[], object]] = {
        "diffusers eager, two branches in turn": lambda: (theirs(0), theirs(1)),
        "stepwell, two branches packed": lambda: model(twice, both),
    }
    return {
        "case": case.name,
        "precision": precision,
        "relative_error": error,
        "chosen": chosen,
        "one": [asdict(t) for t in compare(single, case.rounds)],
        "guided": [asdict(t) for t in compare(guided, case.rounds)],
    }


@torch.no_grad()
def decode(who: str, frames: int, side: int) -> None:
    """Decode a clip of random latents and print by how much the process's peak grew, in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=32).eval()
    latent_frames = (frames - 1) // 4 + 1
    clip = torch.randn(16, latent_frames, side // 8, side // 8)
    layout = Latents(16, 8, 1.0, 0.0, frame_factor=4)
    kept: list[bytes] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
    before = host_memory().resident_bytes
    if who == "diffusers":
        kept.append(vae.decode(clip[None], return_dict=False)[0].numpy().tobytes())
    else:
        decoder, memory, size = WanDecoder(vae, layout), None, (latent_frames, side // 8, side // 8)
        for chunk in range(latent_frames):
            made, memory = decoder.decode(clip, 0, chunk, memory)
            pixels, _ = decoder.join(made, size, 0, chunk, None)
            assert pixels is not None
            kept.append(((pixels + 1) * 127.5).round().to(torch.uint8).numpy().tobytes())
    print((host_memory().peak_bytes - before) / 2**20)


def decode_memory(frames: int, side: int) -> dict[str, Any]:
    """Peaks of both engines for n and 2 n frames."""

    def peak(who: str, count: int) -> float:
        command = [sys.executable, "-m", "benchmarks.video", "--decode", who, str(count), str(side)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    counts = (frames, 2 * frames - 1)
    peaks = {who: [peak(who, count) for count in counts] for who in ("diffusers", "stepwell")}
    return {"side": side, "frames": counts, "peak_mib": peaks, "growth": {who: b / a for who, (a, b) in peaks.items()}}


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# {report['cpu']}: video",
        "",
        f"`{report['command']}`, torch {report['torch']}, diffusers {report['diffusers']}. Least CPU milliseconds on one thread, "
        "interleaved; the factor is against diffusers eager.",
    ]
    for result in report["results"]:
        lines += ["", f"## {result['case']}, {result['precision']}", "", f"Relative error {result['relative_error']:.1e}; "
                  f"{', '.join(result['chosen'])}.", "", "| | CPU ms | factor |", "|---|---|---|"]  # fmt: skip
        lines += [f"| {t['name']} | {t['least_ms']:.1f} | {t['speedup']:.2f} |" for t in (*result["one"], *result["guided"])]
    memory = report["memory"]
    few, many = memory["frames"]
    lines += ["", f"## Decoding {memory['side']} × {memory['side']}: growth of the process's peak, MiB", "",
              f"| | {few} frames | {many} frames | ratio |", "|---|---|---|---|"]  # fmt: skip
    for who, (a, b) in memory["peak_mib"].items():
        lines.append(f"| {who} | {a:.0f} | {b:.0f} | {b / a:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small case only, in fp32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--decode", nargs=3, metavar=("WHO", "FRAMES", "SIDE"), help="one measurement of memory, for itself")
    args = parser.parse_args(arguments)
    if args.decode is not None:
        decode(args.decode[0], int(args.decode[1]), int(args.decode[2]))
        return {}
    torch.set_num_threads(1)
    todo = [("tiny", "fp32")] if args.quick else [(name, precision) for name in CASES for precision in DTYPES]
    report = {
        "cpu": detect().cpu,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "command": "python -m benchmarks.video" + (" --quick" if args.quick else ""),
        "results": [one_step(CASES[name], precision) for name, precision in todo],
        "memory": decode_memory(9, 32) if args.quick else decode_memory(65, 96),
    }
    stem = re.sub(r"[^a-z0-9]+", "-", str(report["cpu"]).lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{stem}-video.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.output / f"{stem}-video.md").write_text(markdown(report))
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()

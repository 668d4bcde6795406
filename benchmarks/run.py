"""Stepwell against diffusers: one denoising step, eight at once, and whole pictures.

    make bench                              # or: python -m benchmarks.run [--quick] [--no-compile] [--output FOLDER]

Same weights, same inputs, one thread, interleaved (see `benchmarks.timing`). diffusers runs eager and, unless
--no-compile, under torch.compile with freezing. Outputs are compared too: a fast wrong answer is no result.
Writes results/<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.timing import compare  # noqa: E402
from stepwell import DiffGenerator  # noqa: E402
from stepwell.config.attention import Shape  # noqa: E402
from stepwell.config.resolve import resolve  # noqa: E402
from stepwell.config.schema import EngineOptions  # noqa: E402
from stepwell.engine.build import find_row_bound, pack_linears, packing_line, split_linears  # noqa: E402
from stepwell.engine.kernels import AttentionPass  # noqa: E402
from stepwell.engine.measure import detect, measure_cpu  # noqa: E402
from stepwell.models.flux import Flux, FluxConfig, key_map  # noqa: E402
from stepwell.ops.linear import Linear, PackedLinear  # noqa: E402
from stepwell.ops.packing import Lane  # noqa: E402
from stepwell.stages.text import Conditioning  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = {"in_channels": 16, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 4,
         "joint_attention_dim": 256, "pooled_projection_dim": 128, "axes_dims_rope": (8, 28, 28)}  # fmt: skip
LARGE = {"in_channels": 64, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 128, "num_attention_heads": 8,
         "joint_attention_dim": 1024, "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A transformer's size and a step's."""

    name: str
    config: dict[str, Any]
    grid: int
    text_tokens: int
    rounds: int


LIMIT = "(its linears alone)"
CASES = {
    "S": Case("FLUX-S: 145 M, width 1024, 256 + 64 tokens", LARGE, 16, 64, 6),
    "T": Case("FLUX-T: 9 M, width 256, 64 + 32 tokens", SMALL, 8, 32, 30),
    "T2": Case("FLUX-T2: 9 M, width 256, 256 + 32 tokens", SMALL, 16, 32, 20),
}


def lean(reference: FluxTransformer2DModel, case: Case, precision: str) -> tuple[Flux, list[str]]:
    """Our transformer with the reference's weights, with what the engine would choose on this machine."""
    config = FluxConfig.from_json(case.config)
    state = reference.state_dict()
    model = Flux(config)
    ours = {name: torch.cat([state[key] for key in keys]) for name, keys in key_map(case.config).items()}
    model.load_state_dict(ours)
    return model, as_engine(model, config.num_attention_heads, config.attention_head_dim, precision)


def as_engine(model: nn.Module, heads: int, head_dim: int, precision: str) -> list[str]:
    """Do to a transformer what the engine would on this machine; returns what that was."""
    model.to(DTYPES[precision]).eval()
    hardware = measure_cpu(detect(), precision, heads * head_dim, heads, head_dim)
    options = EngineOptions(dit_precision=precision, device="cpu")  # type: ignore[arg-type]
    plan = resolve(options, parameters=sum(p.numel() for p in model.parameters()), text_encoders=2, hardware=hardware)
    row_bound = find_row_bound(model, plan)
    AttentionPass.of(options, plan, model, Shape(heads, head_dim), hardware).apply(model)
    if plan.linear.value == "packed":
        pack_linears(model)
    split_linears(model, row_bound)
    return [f"{what} {value}" for what, value, _ in plan.lines() if what in ("linear", "attention")] + [
        f"packed steps {packing_line(row_bound, plan)[1]}"
    ]


def reference_inputs(case: Case, precision: str) -> dict[str, Any]:
    torch.manual_seed(1)
    dtype, side = DTYPES[precision], case.grid
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return {
        "hidden_states": torch.randn(1, side * side, case.config["in_channels"]).to(dtype),
        "encoder_hidden_states": torch.randn(1, case.text_tokens, case.config["joint_attention_dim"]).to(dtype),
        "pooled_projections": torch.randn(1, case.config["pooled_projection_dim"]).to(dtype),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(case.text_tokens, 3),
        "return_dict": False,
    }


def reference_model(case: Case, precision: str) -> FluxTransformer2DModel:
    """diffusers' transformer with random weights."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(**case.config).eval().to(DTYPES[precision])


@torch.no_grad()
def one_step(case: Case, precision: str, *, compiled: bool) -> dict[str, Any]:
    """One forward of one sample, and eight samples: serially by diffusers, packed by us."""
    reference = reference_model(case, precision)
    inputs = reference_inputs(case, precision)
    model, chosen = lean(reference, case, precision)
    conditioning = Conditioning(inputs["encoder_hidden_states"][0], inputs["pooled_projections"][0])
    times = torch.tensor([900.0, 500.0, 100.0])
    prepared = model.prepare(conditioning, times, (1, case.grid, case.grid), 0.0)
    lanes = [Lane(prepared, len(times), case.text_tokens, (1, case.grid, case.grid), step=1) for _ in range(8)]
    alone, together = model.pack(lanes[:1]), model.pack(lanes)
    x = inputs["hidden_states"][0]
    eight = torch.cat([x] * 8)

    wanted = reference(**inputs)[0][0]
    error = ((model(x, alone) - wanted).float().norm() / wanted.float().norm()).item()
    assert error < (1e-4 if precision == "fp32" else 2e-2), error

    single: dict[str, Callable[[], object]] = {"diffusers eager": lambda: reference(**inputs)}
    if compiled:
        fast = compile_reference(reference)
        single["diffusers + torch.compile"] = lambda: fast(**inputs)
    single["stepwell"] = lambda: model(x, alone)
    linears = linear_calls(model, lambda: model(x, alone))
    single[LIMIT] = lambda: [layer(rows) for layer, rows in linears]
    batched: dict[str, Callable[[], object]] = {
        "diffusers eager, 8 in turn": lambda: [reference(**inputs) for _ in range(8)],
        "stepwell, 8 in turn": lambda: [model(x, alone) for _ in range(8)],
        "stepwell, 8 packed": lambda: model(eight, together),
    }
    return {
        "case": case.name,
        "precision": precision,
        "relative_error": error,
        "chosen": chosen,
        "one": [asdict(t) for t in compare(single, case.rounds)],
        "eight": [asdict(t) for t in compare(batched, max(3, case.rounds // 3), warm_up=1)],
    }


def linear_calls(model: torch.nn.Module, forward: Callable[[], object]) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Every linear that one forward calls, with the rows it is called with: what no engine on these kernels can do without."""
    calls: list[tuple[torch.nn.Module, torch.Tensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear | Linear)]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0]))) for layer in layers]
    forward()
    for hook in hooks:
        hook.remove()
    return calls


def compile_reference(reference: FluxTransformer2DModel) -> Callable[..., Any]:
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(reference)  # type: ignore[no-any-return]


def whole_pictures(rounds: int) -> dict[str, Any]:
    """The bundled model end to end, prompt to pixels: one picture, and eight at once."""
    path = Path(sys.modules["stepwell"].__path__[0]) / "zoo" / "tiny-flux"
    pipe = FluxPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a small red circle on a white background"
    options = {"width": 128, "height": 128, "num_inference_steps": 8, "max_sequence_length": 32}
    with DiffGenerator.from_pretrained("stepwell/tiny-flux", threads=1, prompt_cache_mb=0) as g:

        def by_diffusers(seed: int) -> object:
            return pipe(prompt, generator=torch.Generator().manual_seed(seed), **options)

        one = compare(
            {"diffusers eager": lambda: by_diffusers(1), "stepwell": lambda: g.generate(prompt, seed=1, **options)}, rounds
        )
        eight = compare(
            {
                "diffusers eager, 8 in turn": lambda: [by_diffusers(seed) for seed in range(8)],
                "stepwell, 8 requests at once": lambda: g.generate([prompt] * 8, seed=1, **options),
            },
            max(3, rounds // 3),
            warm_up=1,
        )
    return {
        "case": "tiny-flux, 128 × 128, 8 steps, prompt to pixels",
        "precision": "fp32",
        "one": [asdict(t) for t in one],
        "eight": [asdict(t) for t in eight],
    }


def help_seconds() -> float:
    """The least wall-clock seconds of `stepwell --help` in a process of its own."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stepwell", "--help"], capture_output=True, check=True)
        best = min(best, time.perf_counter() - began)
    return best


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# {report['cpu']}",
        "",
        f"`{report['command']}`, torch {report['torch']}, diffusers {report['diffusers']}, {report['cores']} cores. "
        "Least CPU milliseconds on one thread, interleaved; the factor is against diffusers eager.",
    ]
    for result in report["results"]:
        lines += ["", f"**{result['case']}, {result['precision']}**", ""]
        if "chosen" in result:
            lines += [f"{'; '.join(result['chosen'])}; relative error {result['relative_error']:.1e}", ""]
        lines += ["| | CPU ms | factor |", "|---|---|---|"]
        for timing in [*result["one"], *result["eight"]]:
            lines.append(f"| {timing['name']} | {timing['least_ms']:.2f} | {timing['speedup']:.2f} |")
    lines += ["", f"`stepwell --help`: {report['help_seconds']:.2f} s."]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small cases only")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it takes minutes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [whole_pictures(10)]
    for name in ("T",) if args.quick else ("T", "T2", "S"):
        for precision in ("fp32", "bf16"):
            results.append(one_step(CASES[name], precision, compiled=not args.no_compile))
            print(json.dumps(results[-1]), flush=True)
    hardware = detect()
    report = {
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "command": "python -m benchmarks.run" + "".join(f" {argument}" for argument in sys.argv[1:]),
        "help_seconds": help_seconds(),
        "results": results,
    }
    stem = re.sub(r"[^a-z0-9]+", "-", hardware.cpu.lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.output / f"{stem}.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

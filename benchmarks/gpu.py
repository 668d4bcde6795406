"""What only a GPU shows: models of full size with random weights against diffusers, the bundled ones against a CPU, and tests.

    python -m benchmarks.gpu [--only flux,wan,text,bundled,tests] [--small] [--output FOLDER]

Every part is a process of its own, so one that fails or leaves memory behind costs no other; its error is in the report. Times
are of the wall, between synchronisations, candidates taking turns, the least of the rounds. --small takes tiny models, on a CPU
where there is no GPU: it shows that the parts run, and gives no figures worth keeping. Writes results/<gpu>-gpu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import FluxTransformer2DModel, WanTransformer3DModel  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.run import SMALL, Case, reference_inputs  # noqa: E402
from stepwell import DiffGenerator  # noqa: E402
from stepwell.config.attention import Shape  # noqa: E402
from stepwell.config.resolve import resolve  # noqa: E402
from stepwell.config.schema import EngineOptions  # noqa: E402
from stepwell.engine.build_text import take_triton  # noqa: E402
from stepwell.engine.kernels import AttentionPass  # noqa: E402
from stepwell.engine.measure import detect  # noqa: E402
from stepwell.engine.row_kernels import set_row_kernels  # noqa: E402
from stepwell.models import flux as flux_model  # noqa: E402
from stepwell.models import wan as wan_model  # noqa: E402
from stepwell.models.block_causal import Attending, BlockCausal, Router, TextConfig, unfilled  # noqa: E402
from stepwell.models.wan_transformer import Wan, WanConfig  # noqa: E402
from stepwell.ops.experts import Experts  # noqa: E402
from stepwell.ops.packing import Lane  # noqa: E402
from stepwell.ops.rows import RowKernels, RowMaths  # noqa: E402
from stepwell.ops.spans import Span, SpanKernel, SpanLayout, dense_spans  # noqa: E402
from stepwell.stages.latents import Latents  # noqa: E402
from stepwell.stages.text import Conditioning  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if HAS_GPU else ("cpu", torch.float32)
Run = Callable[[], object]

FLUX_DEV = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56)}  # fmt: skip
WAN_1B = {"num_attention_heads": 12, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 8960, "num_layers": 30}
WAN_TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 128, "num_layers": 2}
LLADA_MINI = {"vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20,
              "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8,
              "moe_intermediate_size": 512, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 8, "topk_group": 4,
              "routed_scaling_factor": 2.5, "max_position_embeddings": 8192, "partial_rotary_factor": 0.5, "rope_theta": 600000.0,
              "rms_norm_eps": 1e-6}  # fmt: skip
LLADA_TINY = {**LLADA_MINI, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 16,
              "moe_intermediate_size": 32}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- helpers
def least_ms(candidates: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """The least wall-clock milliseconds of each, in turn, after one call to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name in list(candidates)[:: 1 if number % 2 else -1]:
            _synchronise()
            began = time.perf_counter()
            candidates[name]()
            _synchronise()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: min(times) for name, times in taken.items()}


def _synchronise() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def random_reference(kind: type[Any], config: Mapping[str, Any]) -> Any:
    """diffusers' transformer with random weights, made where and in what it computes."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return kind(**config).eval()
    finally:
        torch.set_default_dtype(before)


def with_weights(model: nn.Module, reference: nn.Module, keys: Mapping[str, tuple[str, ...]]) -> None:
    """Give a model on the meta device the reference's weights."""
    state = reference.state_dict()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    made = {name: torch.cat([state[k].reshape(-1, *shapes[name][1:]) for k in own]) for name, own in keys.items()}
    model.load_state_dict(made, assign=True)


def ways_of(model: nn.Module, heads: int, head_dim: int) -> dict[str, list[tuple[RowMaths, RowKernels]]]:
    """The engine's passes over a transformer, and what each choice of row kernels would set."""
    hardware, shape = detect(), Shape(heads, head_dim)
    precision = "bf16" if HAS_GPU else "fp32"
    choices: dict[str, dict[str, Any]] = {"stepwell": {}}
    if HAS_GPU:
        choices |= {"stepwell, fused kernels": {"fused_kernels": True}, "stepwell, compiled": {"enable_torch_compile": True}}
    made = {}
    for name, more in choices.items():
        options = EngineOptions(device=DEVICE, dit_precision=precision, **more)  # type: ignore[arg-type]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        plan = resolve(options, parameters=parameters, text_encoders=2, hardware=hardware, shape=shape)
        AttentionPass.of(options, plan, model, shape, hardware).apply(model)
        set_row_kernels(model, plan, (heads, head_dim), DTYPE)
        made[name] = [(module, module.kernels) for module in model.modules() if isinstance(module, RowMaths)]
    return made


def chosen(ways: list[tuple[RowMaths, RowKernels]], run: Run) -> Run:
    """The same with these row kernels."""

    def call() -> object:
        for module, kernels in ways:
            module.kernels = kernels
        return run()

    return call


# ---------------------------------------------------------------------------------------------------------------- parts
@torch.no_grad()
def flux(*, small: bool) -> list[dict[str, Any]]:
    """Denoising one picture of FLUX.1-dev's size: 28 steps at 1024², and at 512²."""
    config = {**SMALL, "guidance_embeds": True} if small else FLUX_DEV
    reference = random_reference(FluxTransformer2DModel, config)
    with torch.device("meta"):
        model = flux_model.Flux(flux_model.FluxConfig.from_json(config))
    with_weights(model, reference, flux_model.key_map(config))
    ways = ways_of(model.eval(), config["num_attention_heads"], config["attention_head_dim"])  # type: ignore[arg-type]
    fast = torch.compile(reference) if HAS_GPU else None
    results = []
    for grid, text, steps in [(8, 16, 2)] if small else [(64, 512, 28), (32, 512, 28)]:
        made = reference_inputs(Case("", config, grid, text, 0), "fp32")
        given = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in made.items()}
        for key in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
            given[key] = given[key].to(DTYPE)
        x, noise = given.pop("hidden_states"), torch.linspace(1, 1 / steps, steps)
        guidance = torch.tensor([3.5], device=DEVICE)
        conditioning = Conditioning(given["encoder_hidden_states"][0], given["pooled_projections"][0])
        prepared = model.prepare(conditioning, 1000 * noise, (1, grid, grid), 3.5)
        layouts = [model.pack([Lane(prepared, steps, text, (1, grid, grid), step=step)]) for step in range(steps)]

        def theirs(forward: Any, x: Tensor = x, noise: Tensor = noise, given: Any = given, guidance: Tensor = guidance) -> Tensor:
            for level in noise:
                rest = {**given, "timestep": level[None].to(DEVICE, DTYPE), "guidance": guidance.to(DTYPE)}
                x = x - forward(hidden_states=x, **rest)[0] / len(noise)
            return x[0]

        def ours(x: Tensor = x[0], layouts: Any = layouts) -> Tensor:
            for layout in layouts:
                x = x - model(x, layout) / len(layouts)
            return x

        candidates: dict[str, Run] = {"diffusers": lambda: theirs(reference)}
        if fast is not None:
            candidates["diffusers, compiled"] = lambda: theirs(fast)
        candidates |= {name: chosen(way, ours) for name, way in ways.items()}
        error = ((ours() - theirs(reference)).float().norm() / theirs(reference).float().norm()).item()
        assert error < (0.1 if HAS_GPU else 1e-4), error
        case = f"a FLUX of {sum(p.numel() for p in model.parameters()) / 1e9:.2f} G, {16 * grid} px, {steps} steps"
        results.append({"case": case, "relative_error": error, "ms": least_ms(candidates, 3)})
    return results


@torch.no_grad()
def wan(*, small: bool) -> list[dict[str, Any]]:
    """A guided step of Wan 2.1 1.3B's size: 81 frames of 832 × 480."""
    config, grid = (WAN_TINY, (2, 4, 6)) if small else (WAN_1B, (21, 30, 52))
    reference = random_reference(WanTransformer3DModel, config)
    with torch.device("meta"):
        model = Wan(WanConfig.from_json(config))
    with_weights(model, reference, wan_model.key_map(config))
    ways = ways_of(model.eval(), config["num_attention_heads"], config["attention_head_dim"])
    frames, rows, columns = grid
    clip = torch.randn(16, frames, 2 * rows, 2 * columns, device=DEVICE, dtype=DTYPE)
    states = torch.randn(2, 40, config["text_dim"], device=DEVICE, dtype=DTYPE)
    padded = nn.functional.pad(states, (0, 0, 0, 512 - 40))
    time_of = torch.tensor([500], device=DEVICE)
    prepared = [
        model.prepare(Conditioning(state, state.new_zeros(0), 512 - 40), torch.tensor([500.0]), grid, 0.0) for state in states
    ]  # fmt: skip
    both = model.pack([Lane(each, 1, 0, grid) for each in prepared])
    layout = Latents(16, 8, 1.0, 0.0, frame_factor=4)
    x = torch.cat([layout.pack(clip.float().cpu())] * 2).to(DEVICE, DTYPE)

    def theirs() -> list[Tensor]:
        return [reference(clip[None], time_of, padded[branch : branch + 1], return_dict=False)[0] for branch in (0, 1)]

    wanted = torch.cat([layout.pack(made[0].float().cpu()) for made in theirs()])
    error = ((model(x, both).float().cpu() - wanted).norm() / wanted.norm()).item()
    assert error < (0.1 if HAS_GPU else 1e-4), error
    candidates: dict[str, Run] = {
        "diffusers": theirs,
        **{name: chosen(way, lambda: model(x, both)) for name, way in ways.items()},
    }
    parameters = sum(p.numel() for p in model.parameters()) / 1e9
    case = f"a Wan of {parameters:.2f} G, a guided step of {len(x) // 2} tokens"
    return [{"case": case, "relative_error": error, "ms": least_ms(candidates, 3)}]


@torch.no_grad()
def text(*, small: bool) -> list[dict[str, Any]]:
    """Forwards of LLaDA2-mini's size by both kernels, with the weights that each reads: a prompt of 512 tokens, then one block of
    each of some texts after so many."""
    config = TextConfig.of(LLADA_TINY if small else LLADA_MINI)
    size, count = 32, 2 if small else 16  # tokens of a block, blocks of a prompt
    model = unfilled(config, DTYPE, has_norms=True).to_empty(device=DEVICE).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    layers = [module for module in model.modules() if isinstance(module, Attending)]
    kernels: dict[str, SpanKernel] = {"torch_sdpa": dense_spans}
    if HAS_GPU:
        take_triton(model, size)
        kernels["triton"] = layers[0].kernel
    prompt = Span(list(range(size)) * count, (), range((count - 1) * size, count * size))
    cases = {f"a prompt of {count * size} tokens": [prompt]}
    for texts in (1, 8) if small else (1, 8, 32):
        spans = [Span(range(size), range(i * count, (i + 1) * count), range(size)) for i in range(texts)]
        cases[f"{texts} blocks of {size} tokens after {count * size}"] = spans
    pool = model.pool(32 * count, size)
    pool.storage.normal_()

    def by(kernel: SpanKernel, layout: SpanLayout) -> Run:
        def call() -> object:
            for layer in layers:
                layer.kernel = kernel
            return model(layout, pool)

        return call

    parameters, results = sum(p.numel() for p in model.parameters()) / 1e9, []
    for case, spans in cases.items():
        candidates = {name: by(kernel, model.pack(spans, size)) for name, kernel in kernels.items()}
        read = bytes_read(model, candidates["torch_sdpa"]) / 1e9
        name = f"a LLaDA2 of {parameters:.2f} G, {case}"
        results.append({"case": name, "weights_read_gb": read, "ms": least_ms(candidates, 5)})
    return results


def bytes_read(model: BlockCausal, forward: Run) -> int:
    """Of weights, in one forward: all but the experts that no row takes, and the embedding."""
    taken: list[int] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [r.register_forward_hook(lambda _, __, out: taken.append(len(out[0].unique()))) for r in routers]
    forward()
    for hook in hooks:
        hook.remove()
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    each = sum(p.numel() * p.element_size() for p in experts[0].parameters()) // experts[0].count
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    spared = sum(module.count - used for module, used in zip(experts, taken, strict=True)) * each
    return whole - spared - model.embedding.weight.numel() * model.embedding.weight.element_size()


def bundled(*, small: bool) -> list[dict[str, Any]]:
    """The bundled models here and on a CPU: how far pictures and clips are apart, and whether texts are the same."""
    results = []
    for model, prompt in (("tiny-flux", "a purple star at the top"), ("tiny-wan", "a red circle moving right")):
        made: dict[str, np.ndarray] = {}
        taken: dict[str, float] = {}
        for name, options in (("cpu", {"device": "cpu"}), *_gpu_options()):
            with DiffGenerator.from_pretrained(f"stepwell/{model}", **options) as generator:
                generator.generate(prompt, seed=1)
                one = generator.generate(prompt, seed=1)[0]
            made[name], taken[name] = one.frames, one.timings["total"]
        gaps = {name: float(np.abs(frames.astype(int) - made["cpu"]).mean()) for name, frames in made.items()}
        results.append({"case": f"{model}, prompt to pixels", "grey_levels_from_cpu": gaps, "ms": taken})
    texts = {}
    for name, options in (("cpu", {"device": "cpu"}), *_gpu_options()):
        with DiffGenerator.from_pretrained("stepwell/tiny-llada", **options) as generator:
            texts[name] = generator.generate(messages=[{"role": "user", "content": "sort: 3 1 2"}], max_tokens=40)[0].text
    return [*results, {"case": "tiny-llada, greedy", "texts": texts}]


def _gpu_options() -> list[tuple[str, dict[str, Any]]]:
    return (
        [(f"gpu {precision}", {"device": "cuda", "dit_precision": precision}) for precision in ("fp32", "bf16")]
        if HAS_GPU
        else []
    )


def tests(*, small: bool) -> list[dict[str, Any]]:
    """The tests that take a GPU where there is one."""
    folders = ["tests/ops/test_kernels.py"] if small else ["tests/ops", "tests/engine/test_row_kernels.py", "tests/quant"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *folders], capture_output=True, text=True)
    return [{"case": f"pytest {' '.join(folders)}", "exit_code": done.returncode, "said": done.stdout[-3000:]}]


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "flux": flux,
    "wan": wan,
    "text": text,
    "bundled": bundled,
    "tests": tests,
}


# --------------------------------------------------------------------------------------------------------------- report
def apart(part: str, *, small: bool) -> list[dict[str, Any]]:
    """A part's results, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, *(["--small"] if small else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [{"case": part, "error": done.stderr[-2000:]}]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# {report['gpu']}",
        "",
        f"`{report['command']}`, torch {report['torch']}, diffusers {report['diffusers']}.",
        "",
    ]
    for result in report["results"]:
        if "ms" in result:
            first = next(iter(result["ms"].values()))
            times = (f"{name} {ms:.2f} ms ({first / ms:.2f}×)" for name, ms in result["ms"].items())
            rest = {key: value for key, value in result.items() if key not in ("case", "ms")}
            lines.append(f"- **{result['case']}**: {'; '.join(times)}{f'; {json.dumps(rest)}' if rest else ''}")
        else:
            lines.append(f"- **{result['case']}**: {json.dumps({k: v for k, v in result.items() if k != 'case'})}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--small", action="store_true", help="tiny models: to see that it runs")
    parser.add_argument("--part", choices=list(PARTS), help="this one, here, as JSON to stdout")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.part is not None:
        print(json.dumps(PARTS[args.part](small=args.small)))
        return
    if not (HAS_GPU or args.small):
        parser.error("torch sees no GPU here; --small runs tiny models on the CPU")
    results = []
    for part in args.only.split(","):
        results += apart(part, small=args.small)
        print(json.dumps(results[-1]), flush=True)
    name = detect().gpu or f"{detect().cpu} (no GPU)"
    report = {"gpu": name, "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}".strip(), "torch": torch.__version__,
              "diffusers": diffusers.__version__, "results": results}  # fmt: skip
    stem = args.output / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-gpu"
    args.output.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()

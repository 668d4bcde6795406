"""--enable-torch-compile against eager on a CPU: seconds to compile, and a step of one sample and of eight packed.

    python -m benchmarks.compiled [--output FOLDER]

One thread, interleaved (see `benchmarks.timing`). Compiling is timed with an empty cache. Writes results/<cpu>-compiled.md.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()

import torch
from diffusers import FluxTransformer2DModel

from benchmarks.run import CASES, DTYPES, lean, reference_inputs
from benchmarks.timing import compare
from stepwell.engine.measure import detect
from stepwell.ops.compiled import compiled_kernels
from stepwell.ops.packing import Lane
from stepwell.ops.rows import RowMaths, largest_difference
from stepwell.stages.text import Conditioning


@torch.no_grad()
def rows(name: str, precision: str) -> list[str]:
    """Lines of the table for one transformer."""
    case = CASES[name]
    torch.manual_seed(0)
    reference = FluxTransformer2DModel(**case.config).eval().to(DTYPES[precision])
    inputs = reference_inputs(case, precision)
    (plain, _), (fast, _) = lean(reference, case, precision), lean(reference, case, precision)
    began = time.perf_counter()
    kernels = compiled_kernels()
    largest_difference(kernels, plain.config.num_attention_heads, plain.config.attention_head_dim, DTYPES[precision], "cpu")
    compile_s = time.perf_counter() - began
    for module in fast.modules():
        if isinstance(module, RowMaths):
            module.kernels = kernels
    conditioning = Conditioning(inputs["encoder_hidden_states"][0], inputs["pooled_projections"][0])
    prepared = plain.prepare(conditioning, torch.tensor([500.0]), (1, case.grid, case.grid), 0.0)
    lines = []
    for count in (1, 8):
        packed = plain.pack([Lane(prepared, 1, case.text_tokens, (1, case.grid, case.grid)) for _ in range(count)])
        x = torch.cat([inputs["hidden_states"][0]] * count)
        calls = {"eager": lambda x=x, p=packed: plain(x, p), "compiled": lambda x=x, p=packed: fast(x, p)}
        eager, compiled = compare(calls, case.rounds if count == 1 else case.rounds // 3)
        lines.append(
            f"| {case.name} | {precision} | {count} | {eager.least_ms:.2f} | {compiled.least_ms:.2f} "
            f"| {compiled.speedup:.2f} | {compile_s:.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu = detect().cpu
    lines = [
        f"# {cpu}: --enable-torch-compile against eager",
        "",
        f"`python -m benchmarks.compiled`, torch {torch.__version__}. Least CPU milliseconds of a step on one thread,",
        "interleaved. Wall-clock seconds to compile: the first includes inductor's own start, T2 finds T's code in the cache.",
        "",
        "| transformer | precision | samples | eager ms | compiled ms | factor | compile s |",
        "|---|---|---|---|---|---|---|",
        *(line for name in ("T", "T2") for precision in ("fp32", "bf16") for line in rows(name, precision)),
    ]
    stem = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    (args.output / f"{stem}-compiled.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Microseconds of a sampler's update, ours against diffusers', on latents of several sizes.

    python -m benchmarks.samplers [--steps 50] [--rounds 40]

One thread, interleaved, CPU time (see `benchmarks.timing`). A candidate is all steps of a request, diffusers' own
`set_timesteps` included; making our table is timed apart. Small latents show what the update costs in itself, large ones
what the memory costs. Prints a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from benchmarks.timing import compare
from stepwell.engine.measure import detect
from stepwell.samplers.base import Sampler, Schedule
from stepwell.samplers.dmd import FASTWAN_TIMESTEPS, SHIFT, Dmd
from stepwell.samplers.flow import FlowMatchEuler
from stepwell.samplers.unipc import UniPC

SIZES = {"5 frames of 128 × 128": (16, 2, 16, 16), "81 frames of 832 × 480": (16, 21, 60, 104)}  # latents of Wan 2.1
WAN: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def run_ours(table: Schedule, latents: Tensor, prediction: Tensor) -> Tensor:
    memory = table.begin(torch.Generator().manual_seed(0))
    for index in range(table.steps):
        latents, memory = table.step(latents, prediction, index, memory)
    return latents


def run_theirs(scheduler: Any, steps: int, latents: Tensor, prediction: Tensor) -> Tensor:
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def run_dmd(schedule: Any, latents: Tensor, prediction: Tensor) -> Tensor:
    """FastVideo's loop, which diffusers has not: sigmas looked up in each step, float64."""
    generator = torch.Generator().manual_seed(0)
    for number, timestep in enumerate(FASTWAN_TIMESTEPS):
        sigma = schedule.sigmas.double()[(schedule.timesteps.double() - timestep).abs().argmin()]
        clean = (latents.double() - sigma * prediction.double()).float()
        if number + 1 == len(FASTWAN_TIMESTEPS):
            return clean
        sigma = schedule.sigmas[(schedule.timesteps - FASTWAN_TIMESTEPS[number + 1]).abs().argmin()]
        latents = (1 - sigma) * clean + sigma * torch.randn(clean.shape, generator=generator)
    return latents


def candidates(steps: int) -> dict[str, tuple[Sampler, int, Callable[[Tensor, Tensor], Tensor]]]:
    """Our sampler, its number of steps, and the reference's whole run."""
    unipc, euler = UniPCMultistepScheduler(**WAN), FlowMatchEulerDiscreteScheduler(shift=7.0)
    renoised = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return {
        "UniPC": (UniPC(UniPCMultistepScheduler(**WAN)), steps, lambda x, v: run_theirs(unipc, steps, x, v)),
        "Euler": (
            FlowMatchEuler(FlowMatchEulerDiscreteScheduler(shift=7.0)),
            steps,
            lambda x, v: run_theirs(euler, steps, x, v),
        ),
        "DMD": (Dmd(), len(FASTWAN_TIMESTEPS), lambda x, v: run_dmd(renoised, x, v)),
    }


@torch.no_grad()
def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"{detect().cpu}, torch {torch.__version__}\n")
    print("| sampler | latents | reference, µs a step | ours, µs a step | factor | table, µs | relative error |")
    print("|---|---|---|---|---|---|---|")
    for name, (sampler, steps, theirs) in candidates(args.steps).items():
        for size, shape in SIZES.items():
            generator = torch.Generator().manual_seed(0)
            latents, prediction = torch.randn(2, 1, *shape, generator=generator)
            table = sampler.table(steps, 0)
            expected = theirs(latents, prediction)
            error = float((run_ours(table, latents, prediction) - expected).norm() / expected.norm())
            calls: dict[str, Callable[[], object]] = {
                "reference": lambda x=latents, v=prediction, run=theirs: run(x, v),  # type: ignore[misc]
                "ours": lambda x=latents, v=prediction, table=table: run_ours(table, x, v),  # type: ignore[misc]
                "table": lambda sampler=sampler, steps=steps: sampler.table(steps, 0),  # type: ignore[misc]
            }
            rounds = args.rounds if latents.numel() < 100_000 else max(2, args.rounds // 10)
            us = {timing.name: timing.least_ms * 1e3 for timing in compare(calls, rounds, warm_up=1)}
            row = {"sampler": name, "latents": size, "error": error, "table_us": us["table"]}
            row |= {"reference_us": us["reference"] / steps, "ours_us": us["ours"] / steps}
            rows.append(row)
            factor = us["reference"] / us["ours"]
            print(
                f"| {name} | {size} | {row['reference_us']:.0f} | {row['ours_us']:.0f} | {factor:.1f}× "
                f"| {row['table_us']:.0f} | {error:.0e} |",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()

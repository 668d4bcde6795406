"""How long requests wait under the scheduler's policy, without ageing, and first come, first served: simulated, without a model.

    python -m benchmarks.policy [--quick] [--output FOLDER]

The engine's own `Scheduler` decides; a step takes as long as its tokens cost, which is what steps take on a device that they
saturate, so the figures are the same on every machine. Requests arrive at random (Poisson, from a seed) so that the device is
busy 0.95 of the time, until there were about as many of the rarest kind as asked for; then all are finished. A request's
slowdown is the time from its arrival to its end, by what it takes alone. Writes results/policy.json and .md.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.engine.scheduler import AGEING, Scheduler
from stepwell.engine.steps import StagePlan
from stepwell.types import Request, SamplingParams, SchedulingPolicy

LOAD, SEEDS, RAREST = 0.95, (1, 2, 3, 4, 5), 100
POLICIES: dict[str, tuple[SchedulingPolicy, float]] = {
    "today's": ("shortest", AGEING),
    "no ageing": ("shortest", 0.0),
    "fifo": ("fifo", AGEING),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that are alike: of which model, their stages, and their share of all work. taken: steps of the longest stage that
    are really taken, where the plan only knows a bound."""

    name: str
    model: str
    plan: tuple[StagePlan, ...]
    share: float
    taken: int | None = None

    def steps(self, stage: StagePlan) -> int:
        longest = max(self.plan, key=lambda each: each.steps)
        return self.taken if stage is longest and self.taken is not None else stage.steps

    @property
    def alone(self) -> int:
        """Tokens of work, which alone is its time."""
        return sum(self.steps(stage) * stage.cost for stage in self.plan)


def drawn(name: str, share: float, *, model: str, steps: int, tokens: int, chunks: int) -> Kind:
    """A picture or a video: its prompt, steps of so many tokens, and its decoder in chunks."""
    decode = StagePlan("decode", chunks, max(1, tokens // chunks), False)
    return Kind(name, model, (StagePlan("encode_text", 1, 77, False), StagePlan("denoise", steps, tokens, True), decode), share)


def text(name: str, share: float, *, model: str, tokens: int, weight: float = 1.0) -> Kind:
    """A text of blocks of 32 tokens, of which three settle in a forward; the plan knows that one might. Its prompt has 128."""
    plan = StagePlan("encode_text", 1, 128, True, weight), StagePlan("unmask", tokens // 32 * 33, 32, True, weight)
    return Kind(name, model, plan, share, taken=tokens // 3)


MIXES: dict[str, tuple[Kind, ...]] = {
    "pictures beside videos, half of the work each": (
        drawn("picture, 8 × 1,024 tokens", 0.5, model="a", steps=8, tokens=1024, chunks=1),
        drawn("video, 32 × 8,192 tokens", 0.5, model="b", steps=32, tokens=8192, chunks=8),
    ),
    "many pictures beside few videos, 0.9 of the work and 0.1": (
        drawn("picture, 8 × 1,024 tokens", 0.9, model="a", steps=8, tokens=1024, chunks=1),
        drawn("video, 32 × 8,192 tokens", 0.1, model="b", steps=32, tokens=8192, chunks=8),
    ),
    "texts of one model": (
        text("text of 64 tokens", 0.5, model="a", tokens=64),
        text("text of 1,024 tokens", 0.5, model="a", tokens=1024),
    ),
    "texts of two models, one an eighth of the other": (
        text("text of 64 tokens, small model", 0.25, model="a", tokens=64, weight=0.125),
        text("text of 1,024 tokens, small model", 0.25, model="a", tokens=1024, weight=0.125),
        text("text of 64 tokens, large model", 0.25, model="b", tokens=64),
        text("text of 1,024 tokens, large model", 0.25, model="b", tokens=1024),
    ),
}


def arrivals(mix: Sequence[Kind], seed: int, rarest: int) -> list[tuple[float, Kind]]:
    """When which requests come, in tokens of work, so that they make up LOAD of the device; so many of the rarest, about."""
    rates = [LOAD * kind.share / kind.alone for kind in mix]
    chance = random.Random(seed)
    now, coming = 0.0, []
    for _ in range(round(rarest * sum(rates) / min(rates))):
        now += chance.expovariate(sum(rates))
        coming.append((now, chance.choices(mix, rates)[0]))
    return coming


def simulate(coming: Sequence[tuple[float, Kind]], policy: SchedulingPolicy, ageing: float) -> dict[str, list[float]]:
    """The slowdowns of each kind."""
    models = {kind.model for _, kind in coming}
    scheduler = Scheduler(dict.fromkeys(models, 2048), max_queued=len(coming) + 1, policy=policy, ageing=ageing)
    known: dict[str, tuple[float, Kind]] = {}
    slowdowns: dict[str, list[float]] = {kind.name: [] for _, kind in coming}
    now, waiting = 0.0, list(reversed(coming))
    while waiting or known:
        while waiting and waiting[-1][0] <= now:
            at, kind = waiting.pop()
            request = Request("", SamplingParams(num_outputs=1), id=f"r{len(waiting)}", model=kind.model)
            scheduler.add(request, kind.plan)
            known[f"{request.id}/0"] = at, kind
        step = scheduler.schedule()
        if step is None:
            now = waiting[-1][0]
            continue
        now += scheduler.cost(step)
        for sample, index in step.items:
            at, kind = known[sample]
            is_done = index + 1 == kind.steps(scheduler.position(sample))
            if scheduler.advance(sample, stage_is_done=is_done):
                slowdowns[kind.name].append((now - at) / kind.alone)
                del known[sample]
    return slowdowns


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measured(name: str, mix: Sequence[Kind], rarest: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each policy and kind, over all seeds."""
    rows = []
    for policy, how in POLICIES.items():
        runs = [simulate(arrivals(mix, seed, rarest), *how) for seed in seeds]
        for kind in mix:
            values = [value for run in runs for value in run.get(kind.name, [])]
            least = {"requests": len(values), "mean": sum(values) / len(values), "most": max(values)}
            shown = {f"p{share}": quantile(values, share / 100) for share in (50, 90, 99)}
            rows.append({"mix": name, "policy": policy, "kind": kind.name, **least, **shown})
            print(f"{name}, {policy}, {kind.name}: mean {least['mean']:.1f}×, p99 {shown['p99']:.1f}×", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of one mix, in Markdown."""
    lines = [f"**{rows[0]['mix']}**", "", "| | requests | " + " | ".join(POLICIES) + " |", "|---|---|" + "---|" * len(POLICIES)]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        cells = [" / ".join(f"{row[name]:.1f}" for name in ("mean", "p50", "p99", "most")) for row in own]
        lines.append(f"| {kind} | {own[0]['requests']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, one seed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    rarest, seeds = (10, SEEDS[:1]) if args.quick else (RAREST, SEEDS)
    tables = {name: measured(name, mix, rarest, seeds) for name, mix in MIXES.items()}
    report = {"load": LOAD, "seeds": list(seeds), "rarest": rarest, "rows": [row for rows in tables.values() for row in rows]}
    (args.output / "policy.json").write_text(json.dumps(report, indent=1) + "\n")
    said = (
        f"Load {LOAD}, {len(seeds)} runs. Times what a request takes alone, from its arrival to its end: mean / p50 / p99 / most."
    )
    (args.output / "policy.md").write_text("\n".join([said, "", *(line for rows in tables.values() for line in table(rows))]))
    return report


if __name__ == "__main__":
    main()

"""Texts by refinement: what is served, against one token per forward and against the schedule of SGLang, in forwards and time.

    python -m benchmarks.text [--quick] [--output FOLDER]

Three engines of the same weights in one process: `served`; `one by one`, the same with a threshold that nothing passes, so
that each forward sets one token; and `blockwise`, SGLang's schedule: a prompt goes through in forwards of one block, a finished
block takes a forward of its own, and tokens count once their block is kept. One thread, taking turns, process CPU time; every
round has prompts of its own, so that none is found in the cache. That `served` and `blockwise` write the same is asserted. The
second model has random weights in the proportions of LLaDA2-mini (256 experts, 8 of them for each token); its blocks are filled
in eight refinements, 4 tokens per forward, since random weights are never sure, or in one, to see what the schedules alone make
of the time to the first text. Writes results/<cpu>-text.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from stepwell.config.load import load
from stepwell.config.schema import EngineOptions
from stepwell.engine.build_text import SERVED, build_text_worker
from stepwell.engine.local import LocalEngine
from stepwell.engine.measure import detect
from stepwell.generator_text import text_requests
from stepwell.models import text_architecture
from stepwell.stages.unmask import Schedule
from stepwell.types import Chunk, Done, Event, Failed, Output, Progress, Request
from stepwell.weights.hub import locate
from training.export_llada import write
from training.llada import BLOCK, CONFIG, Llada, tokenizer
from training.words import sample

CANDIDATES = {"served": SERVED, "one by one": SERVED, "blockwise": Schedule(1, False, False)}
RANDOM: dict[str, Any] = {
    **CONFIG,
    **{"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8},
    **{"num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 64},
}
TARGET = {"forwards": 1.25, "first": 8.0}


@dataclass(frozen=True)
class Case:
    """`conversation(number)` makes the messages of a request. at_once: how many requests are under way together."""

    name: str
    model: str
    conversation: Callable[[int], list[dict[str, str]]]
    requests: int
    at_once: int = 1
    rounds: int = 3
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One candidate's requests of one round. Milliseconds; `first_*` is until the first piece of text, summed over requests."""

    texts: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    forwards: int = 0
    commits: int = 0
    cpu_ms: float = 0.0
    first_cpu_ms: float = 0.0
    first_wall_ms: float = 0.0
    first_forwards: int = 0


# ------------------------------------------------------------------------------------------------------------ requests
def short(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": sample(random.Random(f"short {number}"), held_out=True).prompt}]


def long(number: int, tokens: int = 512) -> list[dict[str, str]]:
    """A conversation of about so many tokens, and at least as many, that ends with a question."""
    rng = random.Random(f"long {number}")
    encode = tokenizer().apply_chat_template
    turns = short(number)
    while len(encode(turns, add_generation_prompt=True)["input_ids"]) < tokens:
        example = sample(rng)
        turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}, *turns]
    return turns


def grouped(items: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def run(engine: LocalEngine, requests: Sequence[Request], at_once: int) -> Run:
    """All of them, so many at a time; times are taken on the engine's own thread."""
    made = Run()
    for group in grouped(requests, at_once):
        firsts: dict[str, tuple[float, float, int]] = {}
        steps: Counter[str] = Counter()
        outputs: dict[str, Output] = {}
        over: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def hear(event: Event, firsts: Any = firsts, steps: Any = steps, over: Any = over) -> None:
            if isinstance(event, Chunk) and event.text:  # comes before its step's progress
                firsts.setdefault(event.request_id, (time.process_time(), time.perf_counter(), steps[event.request_id] + 1))
            if isinstance(event, Progress) and event.stage == "denoise" and event.step:
                steps[event.request_id] += 1
            if isinstance(event, Done | Failed):
                over.put(event)

        cpu, wall = time.process_time(), time.perf_counter()
        submitted = [engine.submit(request, hear) for request in group]
        for _ in submitted:
            event = over.get()
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            assert isinstance(event, Done)
            outputs[event.request_id] = event.outputs[0]
        end = time.process_time(), time.perf_counter(), 0
        made.cpu_ms += 1e3 * (end[0] - cpu)
        for request in submitted:
            result = outputs[request.id].text
            assert result is not None
            first = firsts.get(request.id, (*end[:2], result.usage.forwards))
            made.first_forwards += first[2]
            made.first_cpu_ms += 1e3 * (first[0] - cpu)
            made.first_wall_ms += 1e3 * (first[1] - wall)
            made.texts.append(result.text)
            made.prompt_tokens += result.usage.prompt_tokens
            made.tokens += result.usage.completion_tokens + (result.finish_reason == "stop")  # the end is a token too
            made.forwards += result.usage.forwards
            made.commits += result.usage.commits
    return made


def requests_of(case: Case, round_number: int, name: str) -> list[Request]:
    asked = {**case.asked, "seed": 0}
    if name == "one by one":
        asked["diffusion"] = {"threshold": 1.0}
    numbers = range(round_number * case.requests, (round_number + 1) * case.requests)
    made = (text_requests((), case.conversation(number), asked)[0] for number in numbers)
    return [replace(request, model=case.model) for request in made]


# ----------------------------------------------------------------------------------------------------------- candidates
def opened(model: str, schedule: Schedule) -> LocalEngine:
    folder = locate(model)
    architecture = text_architecture(folder)
    assert architecture is not None
    options = load((EngineOptions,), flags={"model_path": [model], "threads": 1, "dit_precision": "fp32"})[EngineOptions]
    return LocalEngine(partial(build_text_worker, options, folder, architecture, model, schedule=schedule))


def random_model(folder: Path, config: dict[str, Any]) -> str:
    """A checkpoint of random weights, and the tokenizer of the bundled model."""
    torch.manual_seed(0)
    write(Llada(config).state_dict(), folder, config)
    return str(folder)


def measured(case: Case) -> dict[str, Any]:
    """Rounds of all candidates in turn. Raises AssertionError if `served` and `blockwise` do not write the same."""
    with ExitStack() as stack:
        engines: dict[str, LocalEngine] = {}
        for name, schedule in CANDIDATES.items():
            engines[name] = opened(case.model, schedule)
            stack.callback(engines[name].shut)
            engines[name].open()
            run(engines[name], requests_of(case, -1, name)[: case.at_once], case.at_once)
        rounds: list[dict[str, Run]] = []
        for number in range(case.rounds):
            names = list(engines) if number % 2 == 0 else list(reversed(engines))
            rounds.append({name: run(engines[name], requests_of(case, number, name), case.at_once) for name in names})
            assert rounds[-1]["served"].texts == rounds[-1]["blockwise"].texts, "schedules write different texts"
    return {"case": case.name, "requests": case.requests * case.rounds, **summary(rounds, case.requests * case.rounds)}


def summary(rounds: list[dict[str, Run]], requests: int) -> dict[str, Any]:
    """Per candidate: sums over rounds, and medians of rounds' ratios to `served`."""
    made: dict[str, Any] = {}
    for name in CANDIDATES:
        own = [each[name] for each in rounds]
        tokens, forwards = sum(r.tokens for r in own), sum(r.forwards for r in own)
        pairs = list(zip(own, (each["served"] for each in rounds), strict=True))
        made[name] = {
            "prompt_tokens": sum(r.prompt_tokens for r in own) / requests,
            "tokens": tokens / requests,
            "forwards": forwards / requests,
            "commits": sum(r.commits for r in own) / requests,
            "tokens_per_forward": tokens / forwards,
            "tokens_per_cpu_s": 1e3 * tokens / sum(r.cpu_ms for r in own),
            "first_forwards": sum(r.first_forwards for r in own) / requests,
            "first_cpu_ms": sum(r.first_cpu_ms for r in own) / requests,
            "first_wall_ms": sum(r.first_wall_ms for r in own) / requests,
            "same_texts": sum(a == b for r, s in pairs for a, b in zip(r.texts, s.texts, strict=True)) / requests,
            "forwards_ratio": forwards / sum(s.forwards for _, s in pairs),
            "speedup_of_served": statistics.median((r.cpu_ms / r.tokens) / (s.cpu_ms / s.tokens) for r, s in pairs),
            "first_ratio": statistics.median(r.first_cpu_ms / s.first_cpu_ms for r, s in pairs),
        }
    return made


def cases(folder: Path, *, quick: bool) -> list[Case]:
    tiny = "stepwell/tiny-llada"
    rounds, factor = (1, 1) if quick else (3, 2)
    found = [
        Case("tiny-llada, short prompts, one after the other", tiny, short, 8 * factor, rounds=rounds),
        Case("tiny-llada, short prompts, 8 at once", tiny, short, 8 * factor, at_once=8, rounds=rounds),
        Case("tiny-llada, a conversation of 512 tokens", tiny, long, 2 * factor, rounds=rounds),
    ]
    config = {**RANDOM, "hidden_size": 128, "num_hidden_layers": 2, "num_experts": 64} if quick else RANDOM
    path = random_model(folder, config)
    size = sum(parameter.numel() for parameter in Llada(config).parameters()) / 1e6
    asked = {"ignore_eos": True, "diffusion": {"threshold": 1.0, "max_steps": BLOCK // 4}}
    for length in (64, 512):
        name = f"random weights, {size:.0f} M, a prompt of {length} tokens, {4 * BLOCK} tokens of text"
        chosen = partial(long, tokens=length)
        found.append(Case(name, path, chosen, 1, rounds=rounds, asked={**asked, "max_tokens": 4 * BLOCK}))
    sure = {"ignore_eos": True, "diffusion": {"threshold": 0.0}, "max_tokens": BLOCK}
    name = f"random weights, {size:.0f} M, a prompt of 512 tokens, a model that is sure at once"
    found.append(Case(name, path, long, 1, rounds=rounds, asked=sure))
    return found


# -------------------------------------------------------------------------------------------------------------- report
def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# {report['cpu']}: texts",
        "",
        f"`{report['command']}`, torch {report['torch']}, {report['cores']} cores. One thread, fp32, candidates taking turns,",
        "process CPU time. Per request; forwards include those that only read a prompt or keep a block (of these: commits);",
        "the end of a text counts as a token. Times with × are ratios of a candidate's to the served one's, medians of rounds:",
        "time per token, and time to the first piece of text. `same` is the share of texts that are what is served. `one by one`",
        "also fills what is behind a text's end, which the model is most sure of.",
    ]
    for result in report["results"]:
        served = result["served"]
        lines += [
            "",
            f"**{result['case']}** ({result['requests']} requests, on average {served['prompt_tokens']:.0f} tokens of prompt and "
            f"{served['tokens']:.0f} of text)",
            "",
            "| | forwards | of these commits | tokens per forward | tokens per CPU second | time per token "
            "| forwards to the first text | CPU ms | time to it | same |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in CANDIDATES:
            own = result[name]
            cells = (
                name,
                *(f"{own[key]:.1f}" for key in ("forwards", "commits")),
                f"{own['tokens_per_forward']:.2f}",
                f"{own['tokens_per_cpu_s']:.0f}",
                f"{own['speedup_of_served']:.2f}×",
                *(f"{own[key]:.1f}" for key in ("first_forwards", "first_cpu_ms")),
                f"{own['first_ratio']:.2f}×",
                f"{own['same_texts']:.0%}",
            )
            lines.append("| " + " | ".join(cells) + " |")
        peer = result["blockwise"]
        lines += [
            "",
            f"Against `blockwise`: {peer['forwards_ratio']:.2f}× fewer forwards (target {TARGET['forwards']}×), first text "
            f"{peer['first_ratio']:.2f}× sooner"
            + (f" (target {TARGET['first']:.0f}×)" if "512" in result["case"] else "")
            + f", after {peer['first_forwards'] / served['first_forwards']:.1f}× fewer forwards.",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, one round, a smaller random model: noisy figures")
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    hardware = detect()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), quick=args.quick):
            if args.only in case.name:
                results.append(measured(case))
                print(json.dumps(results[-1]), flush=True)
    report = {
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "torch": torch.__version__,
        "command": " ".join(("python -m benchmarks.text", *given)),
        "results": results,
    }
    stem = re.sub(r"[^a-z0-9]+", "-", hardware.cpu.lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{stem}-text.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.output / f"{stem}-text.md").write_text(markdown(report))
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()

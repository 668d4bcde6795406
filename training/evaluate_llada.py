"""Grade the bundled text model through the engine's own Python API, on prompts it has never seen.

    python -m training.evaluate_llada src/stepwell/zoo/tiny-llada [--count 60]

Prints the Markdown tables of the model card: the share of right answers for each task, and tokens per forward (forwards that
only keep a finished block included), for each way to fill blocks.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

from stepwell import DiffGenerator
from training.words import TASKS, Example, right, sample

ONE_BY_ONE = "one token per forward"
WAYS: dict[str, dict[str, Any]] = {
    ONE_BY_ONE: {"threshold": 1.0},
    **{f"LowConfidence, {at}": {"threshold": at} for at in (0.95, 0.9, 0.8, 0.6, 0.3)},
    "JointThreshold, 0.9, edits 0.9": {"algorithm": "JointThreshold", "threshold": 0.9, "edit_threshold": 0.9},
    "JointThreshold, 0.6, edits 0.6": {"algorithm": "JointThreshold", "threshold": 0.6, "edit_threshold": 0.6},
    "JointThreshold, 0.3, edits 0.5": {"algorithm": "JointThreshold", "threshold": 0.3, "edit_threshold": 0.5},
    "Hierarchy": {"algorithm": "Hierarchy"},
    "Credit": {"algorithm": "Credit"},
}


@dataclass(frozen=True)
class Mark:
    """Of one task: the share of right answers, tokens (the end of the text counts as one) and forwards."""

    right: float
    tokens: int
    forwards: int

    @property
    def pace(self) -> float:
        return self.tokens / self.forwards


def held_out(task: str, count: int) -> list[Example]:
    """Different examples that are never trained on, the same each time."""
    rng = random.Random(f"held out {task}")
    found: dict[str, Example] = {}
    while len(found) < count:
        example = sample(rng, held_out=True, task=task)
        found.setdefault(example.prompt, example)
    return list(found.values())


def grade(generator: DiffGenerator, examples: list[Example], way: dict[str, Any]) -> Mark:
    made = generator.generate([example.prompt for example in examples], diffusion=way)
    marks = [right(example, each.text) for example, each in zip(examples, made, strict=True)]
    tokens = sum(each.usage.completion_tokens + (each.finish_reason == "stop") for each in made)
    return Mark(sum(marks) / len(marks), tokens, sum(each.usage.forwards for each in made))


def table(scores: dict[str, dict[str, Mark]], kind: str) -> str:
    """kind: `right` or `pace`"""
    lines = ["| | " + " | ".join(TASKS) + " | all |", "|---|" + "---|" * (len(TASKS) + 1)]
    for way, marks in scores.items():
        cells = [marks[task].right if kind == "right" else marks[task].pace for task in TASKS]
        tokens, forwards = sum(m.tokens for m in marks.values()), sum(m.forwards for m in marks.values())
        whole = sum(cells) / len(cells) if kind == "right" else tokens / forwards
        lines.append(f"| {way} | " + " | ".join(f"{cell:.2f}" for cell in (*cells, whole)) + " |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> dict[str, dict[str, Mark]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=60, help="prompts of each task")
    parser.add_argument("--only", default="", help="a part of the names of the ways to run")
    parser.add_argument("--mistakes", type=int, default=0, help="show so many wrong answers of each task")
    args = parser.parse_args(words)
    examples = {task: held_out(task, args.count) for task in TASKS}
    with DiffGenerator.from_pretrained(args.model, threads=1) as generator:
        scores = {
            name: {task: grade(generator, each, way) for task, each in examples.items()}
            for name, way in WAYS.items()
            if args.only in name
        }
        for task in TASKS if args.mistakes else ():
            made = generator.generate([example.prompt for example in examples[task]])
            wrong = [(e, m.text) for e, m in zip(examples[task], made, strict=True) if not right(e, m.text)]
            for example, text in wrong[: args.mistakes]:
                print(f"{task}: {example.prompt!r} -> {text!r}, not {example.answer!r}")
    print(f"Share of right answers, {args.count} held-out prompts each:\n\n{table(scores, 'right')}\n")
    print(f"Tokens per forward:\n\n{table(scores, 'pace')}")
    return scores


if __name__ == "__main__":
    main()

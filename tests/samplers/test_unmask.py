"""Unmasking: each algorithm's rule by hand, and that none of them hangs or writes a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepwell.errors import InvalidRequest
from stepwell.samplers.unmask import ALGORITHMS, Candidate, Canvas, Choice, algorithm_of, params_of, uniform
from stepwell.types import DiffusionParams

MASK = 99


def choose(canvas: Canvas, confidences: dict[int, tuple[int, float]], **params: Any) -> Choice:
    algorithm = algorithm_of(DiffusionParams(**params))
    return algorithm.choose(canvas, [Candidate(place, *confidences[place]) for place in algorithm.places(canvas)])


def masks(*tokens: int, **rest: Any) -> Canvas:
    return Canvas(tokens, MASK, **rest)


def test_low_confidence_sets_what_is_certain_else_the_likeliest() -> None:
    canvas = masks(7, MASK, MASK, MASK)
    sure = choose(canvas, {1: (1, 0.96), 2: (2, 0.95), 3: (3, 0.99)}, algorithm="LowConfidence")
    assert sure.tokens == (7, 1, MASK, 3) and not sure.is_done
    unsure = choose(canvas, {1: (1, 0.2), 2: (2, 0.3), 3: (3, 0.1)})
    assert unsure.tokens == (7, MASK, 2, MASK)
    assert choose(masks(7, MASK), {1: (1, 0.01)}).is_done
    capped = choose(masks(7, MASK, MASK, MASK, step=1), {1: (1, 0.2), 2: (2, 0.3), 3: (3, 0.1)}, max_steps=2)
    assert capped.tokens == (7, 1, 2, 3) and capped.is_done


def test_hierarchy_takes_the_best_of_every_run() -> None:
    canvas = masks(MASK, MASK, 5, MASK, MASK, 5, MASK)
    confidences = {0: (10, 0.5), 1: (11, 0.6), 3: (13, 0.3), 4: (14, 0.2), 6: (16, 0.97)}
    made = choose(canvas, confidences, algorithm="Hierarchy")
    assert made.tokens == (MASK, 11, 5, MASK, MASK, 5, 16)


def test_joint_threshold_corrects_and_ends() -> None:
    canvas = masks(1, 2, MASK, MASK, fixed=1)
    first = choose(canvas, {1: (3, 0.4), 2: (4, 0.6), 3: (5, 0.1)}, algorithm="JointThreshold", max_post_edit_steps=1)
    assert first.tokens == (1, 3, 4, MASK) and not first.is_done
    whole = masks(1, 3, 4, 5, fixed=1, memory=1)
    again = {1: (2, 0.4), 2: (4, 0.9), 3: (5, 0.9)}
    edited = choose(whole, again, algorithm="JointThreshold", max_post_edit_steps=1)
    assert edited.tokens == (1, 2, 4, 5) and not edited.is_done and edited.memory == 0
    spent = choose(masks(1, 3, 4, 5, fixed=1, memory=0), again, algorithm="JointThreshold", max_post_edit_steps=1)
    assert spent.tokens == (1, 3, 4, 5) and spent.is_done
    shy = choose(whole, again, algorithm="JointThreshold", edit_threshold=0.5)
    assert shy.tokens == whole.tokens and shy.is_done


def test_joint_threshold_takes_its_penalty_off_the_left_neighbours_token() -> None:
    algorithm = algorithm_of(DiffusionParams(algorithm="JointThreshold", penalty_lambda=3.0))
    logits, _ = algorithm.adjust(masks(1, 2, MASK, fixed=1), [1, 2], torch.zeros(2, 4))
    assert logits.tolist() == [[0, -3, 0, 0], [0, 0, -3, 0]]


def test_credit_grows_for_a_steady_guess_and_fades() -> None:
    algorithm = algorithm_of(DiffusionParams(algorithm="Credit"))
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    p = logits.softmax(-1)[0, 0].item()
    first, memory = algorithm.adjust(masks(MASK), [0], logits)
    assert first[0, 0].item() == pytest.approx(2 + 0.7 * torch.tensor(1 + p**0.2).log().item())
    second, memory = algorithm.adjust(masks(MASK, memory=memory), [0], logits)
    assert second[0, 0].item() == pytest.approx(2 + 0.7 * torch.tensor(1 + 1.8 * p**0.2).log().item())
    other, _ = algorithm.adjust(masks(MASK, memory=memory), [0], torch.tensor([[0.0, 5.0, 0.0]]))
    assert other[0, 0].item() == pytest.approx(0.7 * torch.tensor(1 + 0.8 * 1.8 * p**0.2).log().item())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_ends_within_its_bound(name: str) -> None:
    algorithm = algorithm_of(DiffusionParams(algorithm=name))
    generator = torch.Generator().manual_seed(0)
    canvas, size = masks(*[MASK] * 16), 16
    for step in range(algorithm.most_steps(size)):
        places = algorithm.places(canvas)
        _, memory = algorithm.adjust(canvas, places, torch.randn(len(places), 50, generator=generator))
        tokens = torch.randint(50, (size,), generator=generator).tolist()  # never the same twice
        candidates = [Candidate(place, tokens[place], 0.3) for place in places]
        choice = algorithm.choose(Canvas(canvas.tokens, MASK, 0, step, memory), candidates)
        canvas = Canvas(choice.tokens, MASK, 0, step + 1, choice.memory)
        if choice.is_done:
            break
    assert choice.is_done and MASK not in choice.tokens


def test_noise_belongs_to_seed_place_and_step() -> None:
    numbers = {uniform(seed, position, step) for seed in (0, 1) for position in range(50) for step in range(5)}
    assert len(numbers) == 500 and all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 500 - 0.5) < 0.05
    assert uniform(1, 2, 3) == uniform(1, 2, 3)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"algorithm": "Fast"}, "LowConfidence"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": True}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"edit_threshold": 0.5}, "does not apply to LowConfidence"),
        ({"max_steps": 0}, "max_steps"),
        ({"speed": 3}, "unknown"),
    ],
)
def test_what_is_wrong_is_refused_by_name(given: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        algorithm_of(params_of(given))

"""The world of words, its grader, and the text model's trainer: what it learns from is what the engine computes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from stepwell.models import llada2
from stepwell.ops.spans import Span
from stepwell.weights.reader import Safetensors
from training import state
from training.export_llada import write
from training.llada import CONFIG, Llada
from training.train_llada import Drawing, Layout, Trainer, parsed
from training.words import SORRY, TASKS, right, sample


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_others_wrong(task: str) -> None:
    rng = random.Random(7)
    examples = [sample(rng, task=task) for _ in range(60)]
    for example, other in itertools.pairwise(examples):
        assert right(example, example.answer)
        assert not right(example, example.answer + "x") and not right(example, "")
        assert right(example, other.answer) == (example.answer == other.answer)
    assert task == "other" or len({example.answer for example in examples}) > 10
    assert (task == "other") == all(example.answer == SORRY for example in examples)


def test_json_may_be_spaced_as_it_likes() -> None:
    example = sample(random.Random(1), task="json")
    assert right(example, example.answer.replace(" ", "")) and not right(example, example.answer.replace('"', "'"))


@pytest.mark.parametrize("task", TASKS)
def test_what_is_held_out_is_never_trained_on(task: str) -> None:
    rng = random.Random(3)
    seen = {sample(rng, task=task).facts for _ in range(300)}
    kept = {sample(rng, task=task, held_out=True).facts for _ in range(20)}
    assert kept and not seen & kept


def test_a_chain_goes_by_its_steps() -> None:
    rng = random.Random(2)
    for _ in range(50):
        example = sample(rng, task="chain")
        way = example.answer.split()
        steps = dict(step.split(">") for step in example.facts.split()[1:])
        assert [steps[here] for here in way[:-1]] == way[1:] and len(steps) == len(way) - 1


def test_training_computes_what_the_engine_does(tmp_path: Path) -> None:
    """The logits of a noisy block beside a clean copy are those of the engine, which has the clean blocks in its context."""
    torch.manual_seed(0)
    model = Llada().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
        for gate in model.gates():
            gate.expert_bias.normal_(std=0.1)
    write({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path)
    engine = llada2.load(llada2.read_config(CONFIG), Safetensors(tmp_path), torch.float32, "cpu")
    layout = Layout(16, 1, 3)
    clean, noisy = torch.randint(0, 266, (2, 4 * layout.size))
    with torch.no_grad():
        ids = torch.cat((noisy[layout.size :], clean[: 3 * layout.size]))
        logits = model(ids[None], layout.positions(), layout.mask(), layout.noisy)[0]
    for block in range(layout.first, layout.last + 1):
        start = block * layout.size
        context = torch.cat((clean[:start], noisy[start : start + layout.size])).tolist()
        span = Span(context, (), range(start, start + layout.size))
        wanted, _ = engine(engine.pack([span], layout.size), engine.pool(1, layout.size))
        own = logits[start - layout.size : start]
        assert (own - wanted).abs().max() < 2e-4 * wanted.abs().max()


def test_sequences_of_a_batch_have_one_layout_and_end_with_ends() -> None:
    drawing = Drawing(random.Random(4), 1024)
    for _ in range(12):
        batch = drawing.batch()
        size, first = batch.layout.size, batch.layout.first
        assert batch.ids.shape[1] == (batch.layout.last + 1) * size
        assert len(batch.ids) * batch.layout.tokens >= 1024
        for ids, given in zip(batch.ids, batch.given, strict=True):
            begins = first * size + int(given.sum())
            ends = (ids[begins:] == CONFIG["eos_token_id"]).nonzero()
            assert int(given.sum()) < size and (given[: int(given.sum())]).all()
            assert not len(ends) or (ids[begins + int(ends[0]) :] == CONFIG["eos_token_id"]).all()


def test_a_short_run_learns_and_can_go_on(tmp_path: Path) -> None:
    args = parsed(["--output", str(tmp_path), "--steps", "24", "--tokens", "256"])
    trainer = Trainer(args)
    trainer.start()
    losses = [trainer.train_step()[0].item() for _ in range(24)]
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])
    assert any(gate.expert_bias.abs().max() > 0 for gate in trainer.model.gates())
    state.save(trainer, tmp_path)
    again = Trainer(args)
    state.restore(again, tmp_path)
    assert again.step == 24
    for own, other in zip(trainer.average.state_dict().values(), again.average.state_dict().values(), strict=True):
        assert torch.equal(own, other)

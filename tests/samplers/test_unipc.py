"""UniPC: the trajectories of diffusers' scheduler, from a table; what it can't do is refused."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load, save
from torch import Tensor

from stepwell.errors import WeightsError
from stepwell.samplers.base import Memory
from stepwell.samplers.unipc import UniPC, UniPCTable

RUNS = ((1, 3.0), (2, 1.0), (3, 5.0), (4, 12.0), (5, 8.0), (9, 3.0), (20, 5.0), (40, 12.0), (60, 1.0))  # steps and shift
SHAPE = (1, 8, 6, 4)


def scheduler(**options: Any) -> UniPCMultistepScheduler:
    """One as Wan's checkpoints have it, but for `options`."""
    return UniPCMultistepScheduler(
        **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **options}
    )


def velocity(latents: Tensor, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A prediction that depends on the latents and has noise of its own."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
    return (torch.tanh(latents) + noise).to(dtype)


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(99))


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def worst(reference: UniPCMultistepScheduler, table: UniPCTable, skipped: int = 0, dtype: torch.dtype = torch.float32) -> float:
    """The largest deviation of a trajectory that both take by the same predictions."""
    theirs = ours = noise()
    memory: Memory = table.begin(torch.Generator())
    reference.set_begin_index(skipped)
    largest = 0.0
    for index, timestep in enumerate(reference.timesteps[skipped:]):
        prediction = velocity(theirs, index, dtype)
        theirs = reference.step(prediction, timestep, theirs, return_dict=False)[0]
        ours, memory = table.step(ours, prediction, index, memory)
        assert ours.dtype == torch.float32
        largest = max(largest, deviation(ours, theirs))
    return largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("order", "solver_type", "lower_order_final", "final_sigmas_type"),
    [
        (*case, final)
        for case in product((1, 2, 3), ("bh1", "bh2"), (True, False))
        for final in ("zero", "sigma_min")
        # where the reference itself answers NaN; what we do there is below
        if not (final == "zero" and (case[1] == "bh1" or (case[0] > 1 and not case[2])))
        and not (final == "sigma_min" and case[0] == 3 and not case[2])
    ],
)
def test_trajectories_are_those_of_diffusers(
    order: int, solver_type: str, lower_order_final: bool, final_sigmas_type: str, dtype: torch.dtype
) -> None:
    options = {"solver_order": order, "solver_type": solver_type, "final_sigmas_type": final_sigmas_type}
    for steps, shift in RUNS:
        reference = scheduler(**options, lower_order_final=lower_order_final, flow_shift=shift)
        table = UniPC(scheduler(**options, lower_order_final=lower_order_final, flow_shift=shift)).table(steps, 0)
        reference.set_timesteps(steps)
        assert table.timesteps.tolist() == reference.timesteps.tolist() and table.sigmas == tuple(reference.sigmas.tolist())
        assert worst(reference, table, dtype=dtype) < 1e-6


def test_a_schedule_that_ends_above_zero() -> None:
    reference = scheduler(shift_terminal=0.1)
    reference.set_timesteps(10)
    assert worst(reference, UniPC(scheduler(shift_terminal=0.1)).table(10, 0)) < 1e-6


@pytest.mark.parametrize("disable_corrector", [[0], [0, 1, 2], [4], [7, 8]])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_corrector_can_be_left_out(order: int, disable_corrector: list[int]) -> None:
    options = {"solver_order": order, "disable_corrector": disable_corrector}
    for skipped in (0, 2):
        reference = scheduler(**options)
        reference.set_timesteps(10)
        assert worst(reference, UniPC(scheduler(**options)).table(10, 0).after(skipped), skipped) < 1e-6


@pytest.mark.parametrize("skipped", [1, 3, 7, 9])
@pytest.mark.parametrize("order", [2, 3])
def test_skipped_steps(order: int, skipped: int) -> None:
    reference = scheduler(solver_order=order)
    reference.set_timesteps(10)
    table = UniPC(scheduler(solver_order=order)).table(10, 0).after(skipped)
    assert table.steps == 10 - skipped
    clean, drawn = noise(), velocity(noise(), 5)
    noised = reference.add_noise(clean, drawn, reference.timesteps[skipped : skipped + 1])
    assert deviation(table.noised(clean, drawn), noised) < 1e-7
    assert worst(reference, table, skipped) < 1e-6


@pytest.mark.parametrize("order", [1, 2, 3])
def test_where_the_reference_answers_nan(order: int) -> None:
    last = UniPC(scheduler(solver_order=order, solver_type="bh1")).table(6, 0)
    latents, clean = run(last, 6)
    assert deviation(latents, clean) < 1e-6  # at σ = 0 there is only what the model says
    still = UniPC(scheduler(solver_order=order, final_sigmas_type="sigma_min", lower_order_final=False)).table(6, 0)
    assert still.sigmas[-1] == still.sigmas[-2]
    assert still.updates[-1].predictor[0] == 1.0 and not any(still.updates[-1].predictor[1:])
    assert run(still, 6)[0].isfinite().all()


def run(table: UniPCTable, steps: int) -> tuple[Tensor, Tensor]:
    """The latents after some steps, and the last estimate of the clean ones before them."""
    latents, memory = noise(), table.begin(torch.Generator())
    estimate = latents
    for index in range(steps):
        prediction = velocity(latents, index)
        estimate = table.estimate(latents, prediction, index)
        latents, memory = table.step(latents, prediction, index, memory)
    return latents, estimate


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_saved_sample_goes_on_bit_for_bit(order: int) -> None:
    table = UniPC(scheduler(solver_order=order)).table(8, 0)
    latents, memory = noise(), table.begin(torch.Generator())
    whole = run(table, 8)[0]
    for index in range(8):
        kept = {str(number): tensor for number, tensor in enumerate((latents, *memory))}
        back = load(save(kept))
        latents, *rest = [back[str(number)] for number in range(len(back))]
        before = [tensor.clone() for tensor in (latents, *rest)]
        after, memory = table.step(latents, velocity(latents, index), index, tuple(rest))
        assert all(map(torch.equal, before, (latents, *rest)))  # a step that fails later can be tried again
        latents = after
    assert memory == () and torch.equal(latents, whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("solver_order", 4),
        ("prediction_type", "epsilon"),
        ("predict_x0", False),
        ("thresholding", True),
        ("use_flow_sigmas", False),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_dynamic_shifting", True),
        ("lower_order_final", False),
        ("final_sigmas_type", "last"),
    ],
)
def test_what_it_can_not_do_is_refused(field: str, value: object) -> None:
    with pytest.raises(WeightsError, match=field) as refused:
        UniPC(scheduler(**{field: value}))
    assert refused.value.param == field and "set" in str(refused.value)

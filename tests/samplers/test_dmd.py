"""The few-step sampler against the reference's loop, written again as it is there: frames first, sigmas looked up per step."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load, save
from torch import Tensor

from stepwell.errors import InvalidRequest
from stepwell.samplers.dmd import Dmd

SHAPE = (5, 8, 6, 4)


def velocity(latents: Tensor, timestep: float) -> Tensor:
    return torch.sin(3 * latents + timestep / 1000)


def looked_up(schedule: FlowMatchEulerDiscreteScheduler, timestep: float) -> float:
    """The sigma of the timestep that is nearest, in the order of FastVideo's scheduler."""
    distances = [abs(float(there) - timestep) for there in schedule.timesteps]
    return float(schedule.sigmas[distances.index(min(distances))])


def reference(timesteps: list[int], shift: float, generator: torch.Generator) -> Tensor:
    """FastVideo's loop in float64, over a model that is `velocity`."""
    schedule = FlowMatchEulerDiscreteScheduler(shift=shift)
    latents = torch.randn(SHAPE, generator=generator).double()
    for number, timestep in enumerate(timesteps):
        clean = latents - looked_up(schedule, timestep) * velocity(latents.float(), timestep).double()
        if number == len(timesteps) - 1:
            return clean
        sigma = looked_up(schedule, timesteps[number + 1])
        latents = (1 - sigma) * clean + sigma * torch.randn(SHAPE, generator=generator).double()
    raise AssertionError("no steps")


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize("timesteps", [[1000, 757, 522], [1000, 750, 500, 250], [988, 932, 852, 608], [1000]])
def test_the_reference_loop(timesteps: list[int], shift: float) -> None:
    theirs = reference(timesteps, shift, torch.Generator().manual_seed(3))
    table = Dmd(timesteps, shift).table(len(timesteps), 0)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(SHAPE, generator=generator)
    memory = table.begin(generator)
    for index, timestep in enumerate(table.timesteps.tolist()):
        latents, memory = table.step(latents, velocity(latents, timestep), index, memory)
    assert table.timesteps.tolist() == timesteps and memory == ()
    assert float((latents - theirs).norm() / theirs.norm()) < 1e-6


def test_the_table_of_fastwan() -> None:
    table = Dmd().table(3, 0)
    assert table.timesteps.tolist() == [1000, 757, 522]
    assert table.sigmas == pytest.approx((1.0, 0.757, 0.522, 0.0), abs=5e-4) and table.sigmas[0] == 1.0
    latents, prediction = torch.randn(4, 6), torch.randn(4, 6).bfloat16()
    assert torch.equal(table.estimate(latents, prediction, 0), latents - prediction.float())


def test_latents_stay_float32_whatever_the_prediction() -> None:
    table = Dmd().table(3, 0)
    latents, memory = torch.randn(4, 6), table.begin(torch.Generator().manual_seed(1))
    for index in range(3):
        latents, memory = table.step(latents, latents.bfloat16(), index, memory)
        assert latents.dtype == torch.float32 and latents.shape == (4, 6)


def test_a_saved_sample_goes_on_bit_for_bit() -> None:
    table = Dmd().table(3, 0)
    outcomes = []
    for is_saved in (False, True):
        generator = torch.Generator().manual_seed(7)
        latents = torch.randn(SHAPE, generator=generator)
        memory = table.begin(generator)
        for index in range(3):
            if is_saved and memory:
                back = load(save({"latents": latents, "memory": memory[0]}))
                latents, memory = back["latents"], (back["memory"],)
            first = table.step(latents, velocity(latents, 0), index, memory)
            torch.randn(9)  # what others draw meanwhile is nothing to it
            again = table.step(latents, velocity(latents, 0), index, memory)
            assert torch.equal(first[0], again[0])  # a step that failed can be run again
            latents, memory = again
        outcomes.append(latents)
    assert torch.equal(*outcomes)


def test_each_step_has_noise_of_its_own() -> None:
    table = Dmd((1000, 900, 800)).table(3, 0)
    still = torch.zeros(50, 40)
    first, memory = table.step(still, still, 0, table.begin(torch.Generator().manual_seed(0)))
    second, _ = table.step(still, still, 1, memory)
    a, b = first / table.sigmas[1], second / table.sigmas[2]
    assert abs(float((a * b).mean())) < 0.1 and float(a.std()) == pytest.approx(1, abs=0.05)


def test_skipped_steps() -> None:
    table = Dmd().table(3, 0).after(1)
    assert table.steps == 2 and table.timesteps.tolist() == [757, 522]
    clean, noise = torch.ones(3), torch.zeros(3)
    assert table.noised(clean, noise).tolist() == pytest.approx([1 - table.sigmas[0]] * 3)


def test_any_other_number_of_steps_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"num_inference_steps = 4: .* 3 steps \(at timesteps 1000, 757, 522\)") as refused:
        Dmd().table(4, 0)
    assert refused.value.param == "num_inference_steps"

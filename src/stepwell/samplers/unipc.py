"""UniPC multistep (Zhao et al. 2023, arXiv 2302.04867) on a rectified flow, as the checkpoints of Wan ask for it.

Reference: diffusers `UniPCMultistepScheduler`, predict_x0 with flow_prediction. Its schedule object makes sigmas and
timesteps; every step's corrector and predictor are linear in the samples and outputs they see, so their weights are worked
out once per request, in float32 and in the reference's order, for the same rounding: with small steps they are differences
of nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepwell.errors import WeightsError
from stepwell.samplers.base import Memory, check_config, noised_at

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler

SUPPORTED: dict[str, tuple[object, ...]] = {
    "solver_order": (1, 2, 3),
    "solver_type": ("bh1", "bh2"),
    "prediction_type": ("flow_prediction",),
    "predict_x0": (True,),
    "thresholding": (False,),
    "solver_p": (None,),
    "use_flow_sigmas": (True,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "final_sigmas_type": ("zero", "sigma_min"),
}


@dataclass(frozen=True, slots=True)
class Solver:
    """The options of a checkpoint. uncorrected: steps, counted before any are skipped, whose outcome is not corrected."""

    order: int
    is_bh1: bool
    lower_order_final: bool
    uncorrected: frozenset[int]


@dataclass(frozen=True, slots=True)
class Update:
    """What one step adds up.

    corrector: weights of the last sample, of the outputs then (newest first) and of this step's output; empty where the
    sample stays as it was predicted. predictor: weights of the sample and of the outputs, newest first.
    """

    corrector: tuple[float, ...]
    predictor: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class UniPCTable:
    """The schedule of one request: sigmas (steps + 1 floats, 1 is pure noise), timesteps (steps,), whole numbers below 1000.

    Memory: the last corrected sample and the clean latents predicted so far, newest first, as many as the next step needs.
    """

    sigmas: tuple[float, ...]
    timesteps: Tensor
    solver: Solver
    updates: tuple[Update, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def after(self, skipped: int) -> UniPCTable:
        """The schedule without its first steps; its order grows from 1 again."""
        if not skipped:
            return self
        solver = self.solver
        uncorrected = frozenset(step - skipped for step in solver.uncorrected)
        return make_table(
            self.sigmas[skipped:],
            self.timesteps[skipped:],
            Solver(solver.order, solver.is_bh1, solver.lower_order_final, uncorrected),
        )

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Where a clean sample starts on this schedule."""
        return noised_at(self.sigmas[0], clean, noise)

    def begin(self, generator: torch.Generator) -> Memory:
        return ()

    def step(self, latents: Tensor, velocity: Tensor, index: int, memory: Memory) -> tuple[Tensor, Memory]:
        """Correct the latents by what the model says of them, then predict the next; both float32."""
        update = self.updates[index]
        # a tensor of no dimensions, as in the reference: a product in the velocity's precision, to which a CPU rounds σ too
        clean = latents.float() - torch.tensor(self.sigmas[index], dtype=torch.float32) * velocity
        sample = _weighted((*memory, clean), update.corrector) if update.corrector else latents.float()
        seen = (sample, clean, *memory[1:])[: len(update.predictor)]
        return _weighted(seen, update.predictor), seen if index + 1 < self.steps else ()

    def estimate(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        """The clean latents the model heads for: x₀ = x_i − σ_i v"""
        return latents.float() - self.sigmas[index] * velocity.float()


class UniPC:
    """Makes a request's table from a checkpoint's scheduler config."""

    def __init__(self, schedule: UniPCMultistepScheduler):
        config = schedule.config
        check_config(config, SUPPORTED)
        if config.final_sigmas_type == "zero" and config.solver_order > 1 and not config.lower_order_final:
            raise WeightsError(
                "scheduler/scheduler_config.json: with lower_order_final = false the step to final_sigmas_type = zero divides "
                "by zero: set lower_order_final to true",
                param="lower_order_final",
            )
        self._schedule = schedule
        self._solver = Solver(
            config.solver_order, config.solver_type == "bh1", config.lower_order_final, frozenset(config.disable_corrector)
        )

    def table(self, steps: int, tokens: int) -> UniPCTable:
        """The table for `steps` steps; the same whatever the number of tokens."""
        self._schedule.set_timesteps(steps)
        return make_table(self._schedule.sigmas.tolist(), self._schedule.timesteps.to(torch.float32).clone(), self._solver)


def make_table(sigmas: Sequence[float], timesteps: Tensor, solver: Solver) -> UniPCTable:
    """The table over any stretch of a schedule."""
    steps = len(timesteps)
    orders = [min(solver.order, index + 1, steps - index if solver.lower_order_final else solver.order) for index in range(steps)]
    levels = torch.tensor(sigmas, dtype=torch.float32)
    correctors: list[tuple[float, ...]] = [()] * steps
    predictors: list[tuple[float, ...]] = [(1.0, *[0.0] * order) for order in orders]  # where two sigmas are the same
    for order in set(orders):
        starts = [index for index in range(steps) if orders[index] == order and sigmas[index] != sigmas[index + 1]]
        if not starts:
            continue
        corrected, predicted = _weights(levels, torch.tensor(starts), order, solver.is_bh1)
        for row, start in enumerate(starts):
            predictors[start] = tuple(predicted[row])
            if start + 1 < steps and start not in solver.uncorrected:
                correctors[start + 1] = tuple(corrected[row])
    updates = tuple(Update(*pair) for pair in zip(correctors, predictors, strict=True))
    return UniPCTable(tuple(sigmas), timesteps, solver, updates)


def _weights(sigmas: Tensor, starts: Tensor, order: int, is_bh1: bool) -> tuple[list[list[float]], list[list[float]]]:
    """The corrector's and the predictor's weights from each of the sigmas at `starts` to the next; order + 2 and order + 1."""
    half_log_snr = torch.log(1 - sigmas) - torch.log(sigmas)
    here = half_log_snr[starts]
    h = half_log_snr[starts + 1] - here
    ratios = torch.stack([(half_log_snr[starts - back] - here) / h for back in range(1, order)] + [torch.ones_like(h)], 1)
    phi_1 = torch.expm1(-h)
    b_h = -h if is_bh1 else phi_1
    rows, right = [], []
    phi_k, factorial = phi_1 / -h - 1, 1
    for power in range(order):
        rows.append(ratios**power)
        right.append(phi_k * factorial / b_h)
        factorial *= power + 2
        phi_k = phi_k / -h - 1 / factorial
    matrix, vector = torch.stack(rows, 1), torch.stack(right, 1)
    # the reference's shortcuts for the lowest orders; the predictor knows no output at the end of its interval
    rho_c = torch.full_like(vector, 0.5) if order == 1 else _solve(matrix, vector)
    rho_p = torch.full_like(vector[:, 1:], 0.5) if order < 3 else _solve(matrix[:, :-1, :-1], vector[:, :-1])

    alpha, b_h, ratios = (1 - sigmas[starts + 1]).double(), b_h.double(), ratios[:, :-1].double()
    sample, newest = (sigmas[starts + 1] / sigmas[starts]).double(), -alpha * phi_1.double()
    scale = (alpha * b_h).unsqueeze(1)
    older_p, older_c = scale * rho_p.double() / ratios, scale * rho_c[:, :-1].double() / ratios
    now = scale[:, 0] * rho_c[:, -1].double()
    predictor = torch.column_stack([sample, newest + older_p.sum(1), -older_p])
    corrector = torch.column_stack([sample, newest + older_c.sum(1) + now, -older_c, -now])
    return corrector.tolist(), predictor.tolist()


def _solve(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, vector.unsqueeze(-1)).squeeze(-1)


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total

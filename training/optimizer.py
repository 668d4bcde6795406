"""Muon for matrices, AdamW for the rest, and a learning rate given by the step count alone.

Muon: K. Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (momentum, orthogonalised
by five Newton–Schulz iterations). The schedule is warm-up, constant, linear decay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _orthogonalise(gradient: Tensor) -> Tensor:
    """(rows, columns) -> the nearest semi-orthogonal matrix, by quintic Newton–Schulz in bfloat16."""
    x = gradient.bfloat16()
    x = x / (x.norm() + 1e-7)
    is_tall = x.size(0) > x.size(1)
    if is_tall:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if is_tall else x).to(gradient.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices and convolution kernels (flattened to out × in·k·k)."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = _orthogonalise(param.grad.lerp(state["momentum"], group["momentum"]).flatten(1))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                scale = max(1, param.size(0) / param[0].numel()) ** 0.5
                param.add_(update.view_as(param), alpha=-group["lr"] * scale)


class Optimizers:
    """Muon and AdamW together over one module, driven by `step(gradient_step)`."""

    def __init__(self, module: nn.Module, total_steps: int, muon_lr: float, adam_lr: float, adam_only: tuple[str, ...]):
        matrices, others = [], []
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            is_matrix = param.ndim > 1 and min(param.flatten(1).shape) >= 8
            (matrices if is_matrix and not any(word in name for word in adam_only) else others).append(param)
        self.params = matrices + others
        self.total_steps = total_steps
        self.rates = (muon_lr, adam_lr)
        self.parts = (Muon(matrices, lr=muon_lr), torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0))

    def factor(self, step: int) -> float:
        """Warm up over 60 steps, hold, then decay linearly over the last 75 %."""
        left = (self.total_steps - step) / (0.75 * self.total_steps)
        return min(1.0, (step + 1) / 60) * max(0.0, min(1.0, left))

    def step(self, step: int) -> None:
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * self.factor(step)
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)

"""A training loop small enough for a test."""

from __future__ import annotations

from collections.abc import Callable

import torch


def trained(
    module: torch.nn.Module, loss: Callable[[], torch.Tensor], *, steps: int, rate: float
) -> tuple[float, float]:
    """The loss before and after; the first gradient must reach every parameter."""
    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    history = []
    for step in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert step or parameter.grad.abs().max() > 0, name
        optimiser.step()
        history.append(value.item())
    return history[0], sum(history[-10:]) / 10

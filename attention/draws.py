"""Random numbers that follow from a seed and a stream alone, made where tensors are: the same on every device.

Heads and sequences share them, so that what one head is shown depends on its own keys and on nothing else.
"""

from __future__ import annotations

import torch

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15  # of the counter
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # shift, factor


def uniforms(seed: int, stream: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) float64 in (0, 1), multiples of 2^-53 and a half; those of different streams are unrelated.

    Source: the generator SplitMix64, Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014.
    """
    start = _mixed((_mixed(seed & MASK) + stream * STEP) & MASK)
    x = torch.arange(1, count + 1, device=device) * _signed(STEP) + _signed(start)
    for shift, factor in ROUNDS:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return (_shifted(x, 11).double() + 0.5) * 2.0**-53


def gaussians(seed: int, stream: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) float64, standard normal."""
    return torch.special.ndtri(uniforms(seed, stream, count, device))


def permutation(seed: int, stream: int, count: int, device: torch.device) -> torch.Tensor:
    """0..count - 1 in a random order, (count,) int64."""
    return uniforms(seed, stream, count, device).argsort()


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """``x >> by`` of 64 bits without a sign."""
    return (x >> by) & (MASK >> by)


def _signed(x: int) -> int:
    """The int64 of the same bits."""
    return x - (1 << 64) if x >> 63 else x


def _mixed(x: int) -> int:
    for shift, factor in ROUNDS:
        x = (x ^ (x >> shift)) * factor & MASK
    return x

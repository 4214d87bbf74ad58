"""How far a sampled step may be off, from the keys that it drew: `attention.sampled.Sampled.certificate` on a GPU.

Everything has a fixed shape and stays on the device.  The draw is taken for independent: systematic draws vary less, so
their bounds are wider than they need be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.special import ndtri

from attention.result import ROUNDING
from attention.sampled import PRIOR, TAIL
from gpu.codes import BLOCK
from gpu.sampled import SampledCache
from hsr import checks
from hsr.errors import ArgumentError

LEAST = 16.0  # keys that a head draws
UNIT = 2.0**-24  # chances are multiples of it


class Spread(NamedTuple):
    """What the draws tell of their own spread, all (B, h), float32 but for ``whole``.

    Attributes:
        variance: of the weights' sum, relative to its square.
        square: mean squared error of the output.
        draws: how many draws carry it, ``(sum x)^2 / sum x^2`` of their shares x.
        expected: mean squared error of the output that the chances let expect.
        whole: bool, whether every key was read, so that nothing was left to chance.
    """

    variance: torch.Tensor
    square: torch.Tensor
    draws: torch.Tensor
    expected: torch.Tensor
    whole: torch.Tensor


def spread(cache: SampledCache, q: torch.Tensor, output: torch.Tensor) -> Spread:
    """Of the last step: q and output (B, h, d), as then.

    Raises:
        ArgumentError: the step left no list of what it drew.
    """
    if cache.single and not cache.draws.listing:
        raise ArgumentError("draws must have listing=True for the spread of a single launch; got False")
    B, g, G, d = cache.batch, cache.groups, cache.per, cache.width
    n, draws = cache.lengths.view(B, g), cache.draws
    start = n.clamp(max=draws.sinks)
    stop = torch.maximum((n - draws.recent).clamp(min=0) // BLOCK.value * BLOCK.value, start)
    count = cache.counts[:, 0].view(B, g)
    starved = count < torch.minimum(torch.full_like(n, cache.floor), (stop - start) // 4)
    whole = starved | ((count > cache.cap) & (not cache.single)) | (stop == start)
    listed = torch.arange(cache.cap, device=q.device) < count[..., None]
    entries = torch.where(listed, cache.drawn.view(B, g, cache.cap), 0)
    chance = torch.where(listed, (entries >> 32) * UNIT, 1.0).float()[:, :, None]  # (B, g, 1, cap)
    ids = entries & 0x7FFFFFFF
    centre = cache.centre.view(B, g, 1, d)
    keys, values = cache.tokens.rows(cache.keys, ids).float(), cache.tokens.rows(cache.values, ids).float() - centre
    out = output.view(B, g, G, d).float() - centre
    scores = q.view(B, g, G, d).float() @ keys.mT * cache.scale
    weights = torch.where(listed[:, :, None], (scores - cache.lse.view(B, g, G, 1)).exp() / chance, 0.0)
    far = values.square().sum(3)[:, :, None]  # (B, g, 1, cap)
    apart = (far - 2 * out @ values.mT + out.square().sum(3, keepdim=True)).clamp(min=0)
    risks = (1 - chance) * weights.square()
    shares = risks * apart
    doubt = (1 - chance).sum(3)
    typical = ((1 - chance) * weights * far.sqrt()).sum(3) / doubt.clamp(min=1e-30)
    carried = shares.sum(3).square() / shares.square().sum(3).clamp(min=1e-38)
    found = risks.sum(3), shares.sum(3), carried, doubt * typical.square()
    nothing = (count == 0) & (stop > start)  # no draw tells nothing, not that there is no error
    unknown = ((nothing | (count > cache.cap)) & ~whole)[..., None]  # or more was drawn than the list holds
    filled = (torch.where(whole[..., None], 0.0, torch.where(unknown, math.inf, part)) for part in found)
    return Spread(*(part.expand(B, g, G).reshape(B, g * G) for part in (*filled, whole[..., None])))


class Bounds(NamedTuple):
    """Arrays of a certificate (B, h): see `attention.result.Certificate`."""

    output_error: torch.Tensor
    relative_error: torch.Tensor
    lse_error: torch.Tensor


def bounds(cache: SampledCache, found: Spread, q: torch.Tensor, output: torch.Tensor, confidence: float) -> Bounds:
    """Bounds that hold with about the confidence each; q and output (B, h, d), whose dtype's rounding counts."""
    B, h = found.square.shape
    distance, directions, longest, centre = (
        part.view(B, -1, 1).expand(B, -1, cache.per).reshape(B, h)
        for part in (cache.distance, cache.directions, cache.longest, cache.centre.norm(dim=1))
    )
    known = found.draws + PRIOR
    variance = (found.draws * found.variance + PRIOR * found.expected / distance.square()) / known
    square = (found.draws * found.square + PRIOR * found.expected) / known
    freedom = 1 / (1 / directions + TAIL / (2 * known))
    size = output.float().norm(dim=2)
    rounding = ROUNDING[checks.dtype_name("output", output)] * (
        size + centre + 2 * distance
    )  # of the weights, and of the output itself
    unknown = found.square.isinf()
    error = torch.where(unknown, math.inf, (square * quantile(freedom, confidence)).sqrt() + rounding)
    relative = torch.where(size > error, error / (size - error).clamp(min=1e-38), math.inf)
    scores = cache.scale * q.float().norm(dim=2) * longest  # at most about this, summed in float32
    lse = float(ndtri((1 + confidence) / 2)) * variance.sqrt() + (cache.width + 8) * UNIT * (1 + scores)
    return Bounds(error, relative, torch.where(unknown, math.inf, lse))


def quantile(freedom: torch.Tensor, confidence: float) -> torch.Tensor:
    """A chi-squared variable's quantile over its degrees of freedom: Wilson and Hilferty (1931), never below one."""
    part = 2 / (9 * freedom)
    return (1 - part + float(ndtri(confidence)) * part.sqrt()).clamp(min=0).pow(3).clamp(min=1.0)


def adjust(cache: SampledCache, found: Spread, eps: float) -> None:
    """Move every head's budget towards a root mean square error of ``eps`` times the values' distance from the centre.

    The squared error falls as one over the number of draws.  At most four times as much or as little in a step, at
    least ``draws.least`` keys, at most ``1 / eps^2``: as many as the bound of threshold sampling asks for.  A head of
    which nothing was learnt, because every key was read or no list tells, keeps its budget.

    Thresholds follow a budget by themselves: what the last one drew against the old budget, it draws against the new.
    """
    B, g, per = cache.batch, cache.groups, cache.per
    wanted = (eps * cache.distance).square().view(B, g, 1)
    square = torch.maximum(found.square, PRIOR * found.expected / (found.draws + PRIOR)).view(B, g, per)
    known = square.isfinite() & ~found.whole.view(B, g, per)
    change = torch.where(known, (square / wanted).clamp(0.25, 4.0), 1.0)
    budget = cache.budget.view(B, g, -1)[:, :, :per]
    least = cache.draws.least or 1.0
    before, drew = budget.clone(), cache.found.view(B, g, -1)[:, :, :per]
    budget.copy_((budget * change).clamp(least, max(least, eps**-2)))
    drew.copy_(torch.where(drew > 0, (drew * (budget / before)).round(), drew))

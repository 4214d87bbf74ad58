"""The coder of `hsr.coder`, fitted where the keys lie: sums over rows there, (d, d) eigenproblems on the host.

The host waits once for the sums and once for the steps; the samples of keys never come to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hsr.coder import STEP, STRETCH, Coder, axes, best_layout, second_moment


def fit(
    keys: torch.Tensor,
    bytes_per_key: int,
    queries: torch.Tensor | None,
    widths: tuple[int, ...],
    grain: Mapping[int, int],
) -> Coder:
    """As `hsr.coder.fit`, of tensors on one device: all of keys (g, n, d), and queries (g, m, d) or None."""
    g, n, d = keys.shape
    rows = keys.double()
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    sums = [centred.transpose(1, 2) @ centred / n]
    if queries is not None:
        known = queries.double()
        sums.append(known.transpose(1, 2) @ known)
    products = torch.stack([*sums, mean[:, None].expand(-1, d, -1)]).cpu().numpy()
    covariance, means = products[0], products[-1][:, 0]
    seconds = (
        [np.eye(d)] * g if queries is None else [second_moment(head, queries.shape[1]) for head in products[1]]
    )  # fmt: skip
    with ThreadPoolExecutor() as pool:
        key_map, query_map, variances = (
            np.array(part) for part in zip(*pool.map(axes, covariance, seconds), strict=True)
        )
    layout = best_layout(variances.sum(axis=0), bytes_per_key, widths, grain)
    bits = layout.bits
    used = min(len(bits), d)
    y = centred @ torch.from_numpy(np.ascontiguousarray(key_map[:, :, :used])).to(keys.device)
    steps, error = np.zeros((g, len(bits))), variances[:, used:].sum(axis=1)
    chosen, lost = _best_steps(y, torch.from_numpy(bits[:used]).to(keys.device))
    steps[:, :used] = chosen
    return Coder(layout, means, key_map, query_map, steps, error + lost)


def _best_steps(y: torch.Tensor, bits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """y (g, n, axes) -> the best steps (g, axes) among STRETCH, and the squared errors (g,) that they leave."""
    size = torch.tensor([STEP.get(width, 0.0) for width in range(9)], dtype=torch.float64, device=y.device)[bits]
    half = 2.0 ** (bits.double() - 1)
    gaussian = y.std(1, correction=0) * size
    steps = gaussian * torch.tensor(STRETCH, dtype=torch.float64, device=y.device)[:, None, None]  # (6, g, axes)
    lost = torch.stack([_lost(y, step[:, None], half) for step in steps])
    least, best = lost.min(0)
    both = torch.stack([steps.gather(0, best[None])[0], least]).cpu().numpy()
    return both[0], both[1].sum(axis=1)


def _lost(y: torch.Tensor, step: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Mean squared error (g, axes) of y (g, n, axes) rounded by steps (g, 1, axes) to ``2 half`` levels."""
    cells = torch.where(step > 0, y / step, 0.0).floor_()
    cells = torch.minimum(torch.maximum(cells, -half), half - 1).add_(0.5)
    return (y - step * cells).square_().mean(1)

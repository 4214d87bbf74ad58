"""The coder of `hsr.coder`, fitted where the keys lie: sums over rows there, (d, d) eigenproblems on the host.

The host waits for d x d numbers a head, never for the sample: there it takes eigenvectors one head after another, which
is faster than on a GPU or in threads (1.2 ms a head at d = 128), and a Cholesky factor takes the place of a second one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from hsr.coder import STEP, STRETCH, Coder, best_layout


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
    root = torch.eye(d, dtype=torch.float64, device=keys.device).expand(g, d, d) if queries is None else _root(queries)
    turned = root.transpose(1, 2) @ (centred.transpose(1, 2) @ centred / n) @ root
    variances, axes = (np.flip(part, -1) for part in np.linalg.eigh(turned.cpu().numpy()))  # falling
    variances = np.maximum(variances, 0.0)
    there = torch.from_numpy(np.ascontiguousarray(axes)).to(keys.device)
    maps = torch.stack([root @ there, torch.linalg.solve_triangular(root.transpose(1, 2), there, upper=True)])
    layout = best_layout(variances.sum(axis=0), bytes_per_key, widths, grain)
    bits = layout.bits
    used = min(len(bits), d)
    y = centred @ maps[0, :, :, :used]
    steps, error = np.zeros((g, len(bits))), variances[:, used:].sum(axis=1)
    chosen, lost = _best_steps(y, torch.from_numpy(bits[:used]).to(keys.device))
    steps[:, :used] = chosen
    key_map, query_map = maps.cpu().numpy()
    return Coder(layout, mean.cpu().numpy(), key_map, query_map, steps, error + lost)


def _root(queries: torch.Tensor) -> torch.Tensor:
    """queries (g, m, d) -> L (g, d, d), lower, of M = L L^T as `hsr.coder.second_moment` makes it.

    `hsr.coder` takes M^(1/2), which is L turned: the principal axes that follow are the same.
    """
    _, m, d = queries.shape
    known, one = queries.double(), torch.eye(d, dtype=torch.float64, device=queries.device)
    moment = known.transpose(1, 2) @ known / max(m, 1)
    size = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    share = d / (d + m)
    shrunk = torch.where(size > 0, (1 - share) * moment / size + share * one, one)
    return torch.linalg.cholesky(shrunk) * torch.where(size > 0, size, 1.0).sqrt()


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

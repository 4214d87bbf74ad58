"""SparseK, a differentiable top-k: the Euclidean projection onto ``{p in [0, 1]^m : sum p = k}``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from attention.modules.arguments import finite
from hsr import HSRIndex, checks
from hsr.errors import ArgumentError


class Threshold(NamedTuple):
    """``tau = pivot + offset``: the gates are ``clip((z - pivot) - offset, 0, 1)``, near the pivot without rounding."""

    pivot: torch.Tensor  # (...,) float64, the k-th largest entry
    offset: torch.Tensor  # (...,) float64 in [-1, 0]

    def gates(self, z: torch.Tensor) -> torch.Tensor:
        """Scores z (..., m) -> gates (..., m) float64."""
        return ((z.double() - self.pivot[..., None]) - self.offset[..., None]).clamp(0, 1)

    @property
    def tau(self) -> torch.Tensor:
        """(...,) float64."""
        return self.pivot + self.offset


def sparsek(z: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """``argmin_p ||p - z||^2`` over ``p in [0, 1]^m`` with ``sum p = k``, which is ``clip(z - tau, 0, 1)``.

    tau is exact up to float64 rounding, whatever the dtype: the sum of the gates is linear between the 2 m points z_i
    and z_i - 1, which are sorted, O(m log m).  The gradient is exact: ``dp/dz = I - 1 1^T / |J|`` on the entries J with
    ``0 < p < 1`` and zero elsewhere; an entry within rounding of 0 or 1, where z has a kink, may fall on either side.
    k is a whole number and gets no gradient.

    Args:
        z: (..., m) float32 or float64, finite, m >= 1; any strides, leading axes may be empty.
        k: 0..m, or int64 of shape (...,), one a row.

    Returns:
        torch.Tensor: p (..., m), like z.

    Raises:
        ArgumentError: another dtype, m = 0, NaN or infinity, k out of range or not whole.

    Source: arXiv 2406.16747, the SparseK operator.

    Example:
        >>> import torch
        >>> from attention.modules import sparsek
        >>> sparsek(torch.tensor([3.0, 0.5, 0.25, -1.0]), 2)  # tau is -0.125
        tensor([1.0000, 0.6250, 0.3750, 0.0000])
    """
    return _Projection.apply(_checked("z", z), _counts(k, z))


def causal_sparsek(u: torch.Tensor, k: int, *, delay: int = 0) -> torch.Tensor:
    """Row t is `sparsek` of ``u_0 .. u_{t - delay}``, all ones where these are at most k; the rest of the row is 0.

    tau grows with t, so that an entry once at 0 stays there.

    Args:
        u: (..., T) float32 or float64, finite, T >= 1.
        k: at least 0.
        delay: at least 0; how much later a row sees an entry.

    Returns:
        torch.Tensor: p (..., T, T), like u; differentiable in u.

    Raises:
        ArgumentError: as for `sparsek`.
    """
    return causal_gates(u, k, delay)[0]


def causal_gates(u: torch.Tensor, k: int, delay: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_sparsek` of u (..., T), and which entries are the row's k largest: p (..., T, T), top (..., T, T) bool.

    Among equal scores the older entry is the larger.
    """
    length = _checked("u", u).shape[-1]
    checks.whole("k", k, 0)
    checks.whole("delay", delay, 0)
    steps = torch.arange(length, device=u.device)
    seen = steps[:, None] - delay >= steps  # (T, T)
    rows = u[..., None, :].expand(*u.shape[:-1], length, length).masked_fill(~seen, -torch.inf)
    counts = (steps + 1 - delay).clamp(0, k).expand(rows.shape[:-1])
    order = rows.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    top = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order, True) & seen
    return _Projection.apply(rows, counts), top


def threshold(z: torch.Tensor, k: torch.Tensor) -> Threshold:
    """tau for z (..., m), where -inf hides an entry, and k (...,) int64, at most the entries that are not hidden.

    With a the k-th largest entry, tau lies in [a - 1, a): a gate of 0 to all entries below a would leave at most k - 1,
    and tau = a - 1 gives the k largest 1 each.  So entries further than 1 from a may be moved to that distance, which
    keeps sums small and exact.
    """
    ordered = z.double().sort(dim=-1, descending=True).values
    last = ordered.gather(-1, (k - 1).clamp_min(0)[..., None])
    pivot = last.clamp_min(torch.finfo(torch.float64).min)  # where every entry is hidden
    near = (ordered - pivot).clamp(-1, 1)
    rising = near.flip(-1).contiguous()
    begins, ends = (rising - 1).clamp(-1, 0), rising.clamp(-1, 0)  # taus at which an entry's gate leaves 1, reaches 0
    edges = torch.cat([begins, ends], dim=-1).sort(dim=-1).values  # (..., 2 m)
    sums = torch.nn.functional.pad(near.cumsum(-1), (1, 0))  # (..., m + 1) of the largest
    full, some = _above(begins, edges), _above(ends, edges)  # entries at 1, and above 0, just right of the edge
    inner = sums.gather(-1, some) - sums.gather(-1, full)
    mass = full + inner - (some - full) * edges  # of the gates, were tau at the edge; falls along the edges
    place = ((mass >= k[..., None]).sum(-1, keepdim=True) - 1).clamp_min(0)
    full, some, inner, edge = (x.gather(-1, place)[..., 0] for x in (full, some, inner, edges))
    solved = (inner + full - k) / (some - full).clamp_min(1)
    return Threshold(pivot[..., 0], torch.where(some > full, solved, edge).clamp(-1, 0))


class Gates(NamedTuple):
    """The positive gates of each row, in CSR form."""

    offsets: np.ndarray  # (rows + 1,) int64
    indices: np.ndarray  # (nnz,) key ids
    gates: np.ndarray  # (nnz,) float64 in (0, 1]
    tau: np.ndarray  # queries' leading shape, float64; -inf for a row without keys


def sparsek_by_index(index: HSRIndex, queries: Any, k: int, *, prefix: Any = None) -> Gates:
    """`sparsek` of the scores ``<w, x_j>`` of indexed features, found by two half-spaces instead of every score.

    The k-th largest score a comes from ``index.topk``.  tau lies in [a - 1, a), so that every key of a positive gate
    lies in the half-space ``<w, x> >= a - 1``, and the gates of what that reports are those of all the keys, up to the
    rounding of the scores.

    Args:
        index: over features x (n, d) or (g, n, d), on the CPU.
        queries: score vectors w, (m, d) or (h, m, d), in the index's dtype.
        k: 1..n; a row that sees fewer keys gives each of them 1.
        prefix: as for `HSRIndex.query`; with ``t + 1`` the gates are those of time t.

    Raises:
        ArgumentError: as for `HSRIndex.topk`.

    Source: the SparseK operator of arXiv 2406.16747 over arXiv 2410.10165's half-space reporting.

    Example:
        >>> import numpy as np
        >>> from attention.modules import sparsek_by_index
        >>> from hsr import HSRIndex
        >>> found = sparsek_by_index(HSRIndex(np.array([[3.0], [0.5], [-1.0], [0.25]])), np.array([[1.0]]), 2)
        >>> found.indices.tolist(), found.gates.tolist(), found.tau.tolist()
        ([0, 1, 3], [1.0, 0.625, 0.375], [-0.125])
    """
    best = index.topk(queries, checks.whole("k", k, 1, index.n), prefix=prefix)
    ends = best.offsets[1:]
    pivots = np.where(ends > best.offsets[:-1], np.append(best.scores, np.inf)[ends - 1], np.inf)
    near = index.query(queries, (pivots - 1).reshape(best.shape), prefix=prefix)
    counts = np.diff(near.offsets)
    order = np.lexsort((near.indices, np.repeat(np.arange(len(counts)), counts)))
    scores, indices = near.scores[order], near.indices[order]
    padded = np.full((len(counts), int(counts.max(initial=0)) + 1), -np.inf)
    held = np.arange(padded.shape[1]) < counts[:, None]
    padded[held] = scores
    found = threshold(torch.from_numpy(padded), torch.from_numpy(np.minimum(counts, k)))
    gates = found.gates(torch.from_numpy(padded)).numpy()
    open_ = held & (gates > 0)
    offsets = np.append(0, np.cumsum(open_.sum(axis=1)))
    tau = np.where(counts > 0, found.tau.numpy(), -np.inf)
    return Gates(offsets, indices[open_[held]], gates[open_], tau.reshape(best.shape))


class _Projection(torch.autograd.Function):
    """z (..., m), k (...,) int64 -> p (..., m)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        gates = threshold(z, k).gates(z)
        ctx.save_for_backward((gates > 0) & (gates < 1))
        return gates.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (inside,) = ctx.saved_tensors
        inner = torch.where(inside, gradients[0], 0)
        mean = inner.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(inside, inner - mean, 0), None


def _above(rising: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """How many of the entries (..., m), ascending, are above each level (..., e): int64 (..., e)."""
    return rising.shape[-1] - torch.searchsorted(rising, levels, right=True)


def _checked(name: str, z: Any) -> torch.Tensor:
    if not isinstance(z, torch.Tensor) or z.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"{name} must be a float32 or float64 tensor; got {getattr(z, 'dtype', type(z).__name__)}")
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ArgumentError(f"{name} must have at least one entry on its last axis; got shape {tuple(z.shape)}")
    return finite(name, z)


def _counts(k: int | torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if not isinstance(k, torch.Tensor):
        return torch.full(z.shape[:-1], checks.whole("k", k, 0, z.shape[-1]), device=z.device)
    if k.dtype != torch.int64 or k.shape != z.shape[:-1]:
        wanted = f"a whole number or int64 of shape {tuple(z.shape[:-1])}"
        raise ArgumentError(f"k must be {wanted} to match z; got {tuple(k.shape)} of {k.dtype}")
    if k.numel() and not (0 <= int(k.min()) and int(k.max()) <= z.shape[-1]):
        raise ArgumentError(f"k must lie in 0..{z.shape[-1]}; got {int(k.min())}..{int(k.max())}")
    return k

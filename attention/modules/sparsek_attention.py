"""SparseK attention: each key-value head keeps k old keys by a learned score, and a window of recent ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from attention.modules.arguments import finite, host, share, tensor
from attention.modules.projection import causal_gates, sparsek_by_index, threshold
from hsr import HSRIndex, checks


class Rows(NamedTuple):
    """Keys of a cache, in the order of their positions."""

    k: torch.Tensor  # (B, g, rows, width of a head), without gates
    v: torch.Tensor  # likewise
    u: torch.Tensor  # (B, g, rows), scores

    def before(self, stop: int) -> Rows:
        """The first rows, or all but the last -stop."""
        return Rows(*(x[:, :, :stop] for x in self))

    def since(self, start: int) -> Rows:
        """The rows from start on."""
        return Rows(*(x[:, :, start:] for x in self))

    def chosen(self, order: torch.Tensor) -> Rows:
        """The rows named by order (B, g, rows)."""
        wide = order[..., None].expand(*order.shape, self.k.shape[-1])
        return Rows(self.k.gather(2, wide), self.v.gather(2, wide), self.u.gather(2, order))

    def followed(self, later: Rows) -> Rows:
        """These rows, then later ones."""
        return Rows(*(torch.cat(pair, dim=2) for pair in zip(self, later, strict=True)))


class SparseKCache(NamedTuple):
    """What a step of `SparseKAttention` needs of the past: at most ``k + window`` keys and values a head.

    Gates are not in it: tau moves with every token.  tau never falls, so that a score at or below it is out for good,
    and so is a key that left the k best.
    """

    far: Rows  # at most k
    near: Rows  # at most window, the latest
    scores: torch.Tensor  # (B, g, s): those above tau among all that left the window, -inf where a head has fewer
    left: int  # how many tokens left the window


class SparseKAttention(nn.Module):
    """Causal attention to the k old keys of largest score and to a window, the selection trained by `sparsek`.

    ``u_t = <w, x_t> + slope t`` scores a token, for each key-value head, whatever the query.  Of the keys older than
    the window, row t attends to the k of largest u, key and value each multiplied by its gate ``p = sparsek(u, k)``
    over all of those (1 where they are at most k); window keys have gate 1, and one softmax spans both.  Gates are how
    the score learns; they fall to 0 continuously, but a key of positive gate that is not among the k best is not
    attended to, as in the paper.

    `forward` is the dense form to train.  To generate, `prompt` and `step` give the same rows from a cache of at most
    ``k + window`` keys and values per head, because a key that left the k best never returns.  Beside them the cache
    holds the single scores above tau, which all enter tau: more than k where many lie within 1 of each other, bounded
    if ``slope > 0`` and the features are.

    Choices that we made where our notes of the paper are silent: the window's keys take no part in the selection, the
    slope is a constant, no position is encoded in keys or queries, and no projection has a bias.  Among equal scores
    the older key is kept.

    Args:
        width: of an input x.
        heads: query heads h.
        k: old keys to keep, at least 1.
        window: latest keys, the row's own included; at least 0.
        key_heads: g, a divisor of heads; None means heads.
        slope: of the scores by position, at least 0.
        dtype: float32 or float64.

    Raises:
        ArgumentError: a number out of range, a width that heads do not divide.

    Source: arXiv 2406.16747.

    Example:
        >>> import torch
        >>> from attention.modules import SparseKAttention
        >>> layer = SparseKAttention(16, heads=4, k=3, window=2, key_heads=2, dtype=torch.float64)
        >>> x = torch.randn(1, 20, 16, dtype=torch.float64)
        >>> whole = layer(x)
        >>> _, cache = layer.prompt(x[:, :19])
        >>> last, cache = layer.step(x[:, 19], cache)
        >>> bool(torch.allclose(last, whole[:, 19])), cache.far.k.shape[2] + cache.near.k.shape[2]
        (True, 5)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        k: int,
        window: int,
        *,
        key_heads: int | None = None,
        slope: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.heads = checks.whole("heads", heads, 1)
        self.key_heads = self.heads if key_heads is None else checks.whole("key_heads", key_heads, 1)
        share("heads", self.heads, "key_heads", self.key_heads)
        self.width, self.head_width = width, share("width", width, "heads", self.heads)
        self.k, self.window = checks.whole("k", k, 1), checks.whole("window", window, 0)
        self.slope = checks.real("slope", slope, 0.0, math.inf)
        self.dtype = dtype
        narrow = self.key_heads * self.head_width
        self.query = nn.Linear(width, width, bias=False, dtype=dtype)
        self.key = nn.Linear(width, narrow, bias=False, dtype=dtype)
        self.value = nn.Linear(width, narrow, bias=False, dtype=dtype)
        self.score = nn.Linear(width, self.key_heads, bias=False, dtype=dtype)
        self.out = nn.Linear(width, width, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, width) -> (B, T, width), every row as if the tokens after it were not there; O(T^2) memory.

        Raises:
            ArgumentError: another shape or dtype, B or T = 0, NaN or infinity, scores that overflow.
        """
        length = finite("x", tensor("x", x, "B", "T", self.width, dtype=self.dtype)).shape[1]
        rows = self._rows(x, 0)
        p, best = causal_gates(rows.u, self.k, self.window)
        steps = torch.arange(length, device=x.device)
        distance = steps[:, None] - steps
        near = (distance >= 0) & (distance < self.window)
        return self._attended(self._queries(x), rows, torch.where(near, 1, p), near | best)

    def prompt(self, x: torch.Tensor) -> tuple[torch.Tensor, SparseKCache]:
        """Outputs of a prompt x (B, T, width), on the CPU, and the cache after it.

        The cache is found by half-spaces: an `HSRIndex` over the features (x_t, t) is asked with (w, slope), one query
        for each key-value head (`sparsek_by_index`).  Keys whose scores tie within their rounding are interchangeable.
        Over one prompt that costs more than a product with w; it is the form to use where features are indexed anyway.

        Raises:
            ArgumentError: as for `forward`, or another device.
        """
        host("x", x)
        output = self(x)
        length = x.shape[1]
        left = max(0, length - self.window)
        rows = self._rows(x, 0)
        order = torch.empty(len(x), self.key_heads, 0, dtype=torch.int64)
        scores, far = rows.u[:, :, :0], rows.before(0)
        if left:
            order, hidden = self._reported(x, left)
            scores = rows.u.gather(2, order).masked_fill(hidden, -torch.inf)
            best = scores.sort(dim=2, descending=True, stable=True).indices[..., : min(self.k, left)]
            far = rows.chosen(order.gather(2, best).sort(dim=2).values)
        return output, SparseKCache(far, rows.since(left), scores, left)

    def step(self, x: torch.Tensor, cache: SparseKCache) -> tuple[torch.Tensor, SparseKCache]:
        """Output of one more token x (B, width), and the cache with it; the given cache stays as it was.

        Under ``torch.no_grad()``, as one generates; else gradients flow back through the cache, which keeps all steps.

        Raises:
            ArgumentError: a shape or dtype that does not match the cache, NaN or infinity.
        """
        batch = cache.near.k.shape[0]
        x = finite("x", tensor("x", x, batch, self.width, dtype=self.dtype))[:, None]
        near = cache.near.followed(self._rows(x, cache.left + cache.near.k.shape[2]))
        far, scores, left = cache.far, cache.scores, cache.left
        if near.k.shape[2] > self.window:
            left += 1
            oldest, near = near.before(1), near.since(1)
            scores = torch.cat([scores, oldest.u], dim=2)
            far = _best(far.followed(oldest), self.k)
        gates = torch.ones_like(far.u)
        if left > self.k:
            found = threshold(scores, torch.full(scores.shape[:2], self.k, device=x.device))
            scores = _above(scores, found.gates(scores))
            gates = found.gates(far.u).to(self.dtype)
        rows = far.followed(near)
        gates = torch.cat([gates, torch.ones_like(near.u)], dim=2)[:, :, None]
        output = self._attended(self._queries(x), rows, gates, torch.ones_like(gates, dtype=torch.bool))
        return output[:, 0], SparseKCache(far, near, scores, left)

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, width) -> (B, g, G, T, width of a head)."""
        split = self.query(x).unflatten(2, (self.key_heads, self.heads // self.key_heads, self.head_width))
        return split.permute(0, 2, 3, 1, 4)

    def _rows(self, x: torch.Tensor, start: int) -> Rows:
        """x (B, T, width), at positions from start on -> keys, values, scores."""
        k, v = (f(x).unflatten(2, (self.key_heads, self.head_width)).transpose(1, 2) for f in (self.key, self.value))
        steps = torch.arange(start, start + x.shape[1], dtype=self.dtype, device=x.device)
        return Rows(k, v, finite("the score of x", self.score(x).transpose(1, 2) + self.slope * steps))

    def _attended(self, q: torch.Tensor, rows: Rows, gates: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """q (B, g, G, m, dh), n rows, gates and seen (B, g, m, n) -> (B, m, width)."""
        scores = torch.einsum("bgrmd,bgNd->bgrmN", q, rows.k) * gates[:, :, None] / math.sqrt(self.head_width)
        weights = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(dim=-1) * gates[:, :, None]
        mixed = torch.einsum("bgrmN,bgNd->bmgrd", weights, rows.v)
        return self.out(mixed.flatten(2))

    def _reported(self, x: torch.Tensor, left: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (B, g, s) of positive gate, ascending, among the first ``left``; where there are none, bool."""
        steps = torch.arange(x.shape[1], dtype=self.dtype)
        features = torch.cat([x.detach(), steps.expand(len(x), -1)[..., None]], dim=2)
        slopes = torch.full((self.key_heads, 1), self.slope, dtype=self.dtype)
        w = torch.cat([self.score.weight.detach(), slopes], dim=1)
        found = sparsek_by_index(HSRIndex(features), w.expand(len(x), -1, -1), min(self.k, left), prefix=left)
        counts = np.diff(found.offsets).reshape(len(x), self.key_heads, 1)
        held = np.arange(counts.max()) < counts
        positions = np.zeros(held.shape, np.int64)
        positions[held] = found.indices
        return torch.from_numpy(positions), torch.from_numpy(~held)


def _best(rows: Rows, k: int) -> Rows:
    """Rows (B, g, f), of which at most one is too many -> the k of largest score, the older of equals."""
    count = rows.u.shape[2]
    if count <= k:
        return rows
    steps = torch.arange(count, device=rows.u.device)
    least = (rows.u == rows.u.amin(dim=2, keepdim=True)) * steps
    latest = least.amax(dim=2, keepdim=True)
    kept = steps[:k]
    return rows.chosen(kept + (kept >= latest))


def _above(scores: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Scores (B, g, s), in as few columns as hold those of positive gate; -inf elsewhere."""
    kept = scores.masked_fill(gates <= 0, -torch.inf)
    most = int((gates > 0).sum(dim=2).max())  # a batch has at least one row
    return kept.gather(2, (gates <= 0).long().sort(dim=2, stable=True).indices[..., :most])

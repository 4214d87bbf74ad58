"""Searching by narrow keys of their own: DARE's two embedding tables, and selection for full attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from attention.engine import Plan, fold
from attention.modules.arguments import host, tensor
from attention.policies import TopR
from attention.result import Certificate, Counters, Result
from attention.values import Values
from attention.weights import Softmax
from hsr import HSRIndex, checks
from hsr.backend import choose
from hsr.errors import ArgumentError


class DecoupledSession:
    """Softmax over the r best of narrow keys, values of any other width: `attend`, for a batch of ragged histories.

    Args:
        index_keys: (B, n, d_index), numpy or torch on the CPU; what is searched, and what the weights come from.
        values: (B, n, dv) of the same dtype.
        r: keys to keep, at least 1; a history that has fewer keeps all.
        lengths: (B,) whole numbers in 0..n, or None for n: history b is the first ``lengths[b]`` keys.
        scale: of the scores, positive; None means ``1 / sqrt(d_index)``.
        method: index method, a name of the dispatch table or "auto".

    Raises:
        ArgumentError: shapes, dtypes, lengths or numbers that do not fit, NaN or infinity.

    Source: arXiv 2410.02604.

    Example:
        >>> import numpy as np
        >>> from attention.modules import DecoupledSession
        >>> rng = np.random.default_rng(0)
        >>> session = DecoupledSession(rng.random((2, 200, 4)), rng.random((2, 200, 32)), 20, lengths=[150, 0])
        >>> result = session.attend(rng.random((2, 3, 4)))  # three targets for each of two users
        >>> result.output.shape, result.counters.reported.tolist(), result.empty[1].tolist()
        ((2, 3, 32), [[20, 20, 20], [0, 0, 0]], [True, True, True])
    """

    def __init__(
        self,
        index_keys: Any,
        values: Any,
        r: int,
        *,
        lengths: Any = None,
        scale: float | None = None,
        method: str = "auto",
    ) -> None:
        self._plan = Plan(Softmax(), TopR(checks.whole("r", r, 1)), scale)
        batch, n, _ = checks.floats("index_keys", index_keys, (3,)).shape
        checks.floats("values", values, (3,))
        names = [checks.dtype_name(name, x) for name, x in (("index_keys", index_keys), ("values", values))]
        if 0 in index_keys.shape:
            raise ArgumentError(f"index_keys must have no axis of 0; got shape {tuple(index_keys.shape)}")
        if tuple(values.shape[:2]) != (batch, n) or names[0] != names[1]:
            wanted = f"({batch}, {n}, dv) of {names[0]} to match index_keys"
            raise ArgumentError(f"values must be {wanted}; got {tuple(values.shape)} of {names[1]}")
        self._lengths = checks.lengths("lengths", lengths, (batch,), n)
        self._values = Values(values)
        self._index = self._plan.index(index_keys, method)

    @property
    def index(self) -> HSRIndex:
        """The index over the narrow keys, a head for each history."""
        return self._index

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64: how many keys of each history are there."""
        return self._lengths.copy()

    def append(self, index_keys: Any, values: Any) -> None:
        """Add keys (B, t, d_index) and values (B, t, dv) to every history; if either is refused, neither is added.

        Raises:
            ArgumentError: shapes or dtypes that do not match; a history shorter than another, after whose end they
                would lie.
        """
        if (self._lengths != self._index.n).any():
            raise ArgumentError(f"lengths must all be {self._index.n} to append; got {self._lengths.tolist()}")
        checks.floats("index_keys", index_keys, (3,))
        added = self._values.checked(values)
        if tuple(values.shape[:2]) != tuple(index_keys.shape[:2]):
            wanted = f"{(*index_keys.shape[:2], 'dv')} to match index_keys"
            raise ArgumentError(f"values must be {wanted}; got {tuple(values.shape)}")
        self._index.append(index_keys)
        self._values.append(added)
        self._lengths = self._lengths + added.shape[1]

    def attend(self, index_q: Any) -> Result:
        """Targets index_q (B, m, d_index), each over its history -> output (B, m, dv), leading shapes (B, m).

        An empty history gives zeros, and is marked ``empty``.  The certificate bounds the distance to the softmax over
        the whole history.

        Raises:
            ArgumentError: another batch, width or dtype, NaN or infinity.
        """
        checks.floats("index_q", index_q, (3,))
        wanted = (self._index.heads, self._index.d)
        if (index_q.shape[0], index_q.shape[2]) != wanted:
            raise ArgumentError(f"index_q must be ({wanted[0]}, m, {wanted[1]}); got shape {tuple(index_q.shape)}")
        limits = np.repeat(self._lengths[:, None], index_q.shape[1], axis=1)
        return self._plan.attend(index_q, self._index, self._values, limits).shaped(limits.shape, index_q)


class DecoupledAttention(nn.Module):
    """A user's history pooled for a target item, with one embedding table to attend and another to represent.

    Tables shared by both tasks get gradients that conflict, the paper finds; here the attention table has its own,
    usually narrower, width.  Of a history the r items of largest ``<a_target, a_j> / sqrt(d_a)`` are kept, a softmax of
    these scores weighs their representations, and the features are the target's representation, the pooled one, and
    their product (target-aware).  A history without items pools to zero; masking by a large negative score, as the
    published code does, would pool the padding instead.

    Several kinds of ids (item, category, time) are one table here: their scores, each with its own scale, add up to one
    product of concatenated embeddings.  Target and history share a table, and the MLP on top is the caller's.

    Args:
        items: number of item ids.
        attention_width: d_a.
        representation_width: d_r.
        r: items to keep, at least 1.
        dtype: float32 or float64.

    Raises:
        ArgumentError: a number out of range.

    Source: arXiv 2410.02604; thuml/DARE.

    Example:
        >>> import torch
        >>> from attention.modules import DecoupledAttention
        >>> layer = DecoupledAttention(items=1000, attention_width=4, representation_width=16, r=20)
        >>> history, targets = torch.randint(1000, (2, 200)), torch.randint(1000, (2, 5))
        >>> lengths = torch.tensor([200, 37])
        >>> features = layer(history, targets, lengths)  # to train; the same by HSRIndex:
        >>> found = layer.search(layer.session(history, lengths), targets)
        >>> features.shape, bool(torch.allclose(features, found, atol=1e-5))
        (torch.Size([2, 5, 48]), True)
    """

    def __init__(
        self,
        items: int,
        attention_width: int,
        representation_width: int,
        r: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.items, self.r = checks.whole("items", items, 1), checks.whole("r", r, 1)
        self.attention_width = checks.whole("attention_width", attention_width, 1)
        self.representation_width = checks.whole("representation_width", representation_width, 1)
        self.attention = nn.Embedding(items, attention_width, dtype=dtype)
        self.representation = nn.Embedding(items, representation_width, dtype=dtype)

    def forward(self, history: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """History (B, n), targets (B, m), lengths (B,), all int64 -> features (B, m, 3 d_r); dense, what to train.

        Raises:
            ArgumentError: other shapes or dtypes, ids or lengths out of range; a GPU is waited for.
        """
        self._checked(history, lengths)
        self._ids("targets", targets, len(history))
        q, k = self.attention(targets), self.attention(history)
        scores = q @ k.transpose(1, 2) / math.sqrt(self.attention_width)  # (B, m, n)
        padding = torch.arange(history.shape[1], device=history.device) >= lengths[:, None, None]
        best = scores.masked_fill(padding, -torch.inf).topk(min(self.r, history.shape[1]), dim=2)
        full = lengths[:, None, None] > 0
        weights = torch.where(full, best.values, 0).softmax(dim=2) * full  # (B, m, r)
        chosen = history[:, None].expand(-1, targets.shape[1], -1).gather(2, best.indices)
        pooled = torch.einsum("bmr,bmrd->bmd", weights, self.representation(chosen))
        return self._features(targets, pooled)

    def session(self, history: torch.Tensor, lengths: torch.Tensor, *, method: str = "auto") -> DecoupledSession:
        """Histories (B, n), lengths (B,), on the CPU -> an index over their attention embeddings, to be searched.

        Raises:
            ArgumentError: as for `forward`.
        """
        host("history", history)
        self._checked(history, lengths)
        with torch.no_grad():
            keys, values = self.attention(history), self.representation(history)
            return DecoupledSession(keys, values, self.r, lengths=lengths.numpy(), method=method)

    def search(self, session: DecoupledSession, targets: torch.Tensor) -> torch.Tensor:
        """Features (B, m, 3 d_r) of targets (B, m) by the session's index: those of `forward`, without gradients.

        Items that tie in score are interchangeable.

        Raises:
            ArgumentError: as for `forward`.
        """
        self._ids("targets", targets, session.index.heads)
        with torch.no_grad():
            return self._features(targets, session.attend(self.attention(targets)).output)

    def _features(self, targets: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        target = self.representation(targets)
        return torch.cat([target, pooled, target * pooled], dim=2)

    def _checked(self, history: torch.Tensor, lengths: torch.Tensor) -> None:
        self._ids("history", history, "B")
        tensor("lengths", lengths, len(history), dtype=torch.int64)
        _within("lengths", lengths, history.shape[1])

    def _ids(self, name: str, ids: torch.Tensor, batch: int | str) -> None:
        _within(name, tensor(name, ids, batch, "n", dtype=torch.int64), self.items - 1)


def decode_by_index(
    index_q: Any, index: HSRIndex, q: Any, k: Any, v: Any, r: int, *, scale: float | None = None
) -> Result:
    """Attention of full queries over full keys, over the r keys that narrow ones choose: ``d_index != d``.

    Every query head keeps the r keys of largest ``<index_q, index_k>`` and attends to those by ``scale <q, k>``, the
    contract of systems whose selector has embeddings of its own.

    Args:
        index_q: (h, m, d_index) or (B, h, m, d_index), in the index's dtype.
        index: over index_k (g, n, d_index), for a batch (B g, n, d_index), no key deleted; numpy or torch on the CPU.
        q: (h, m, d) or (B, h, m, d).
        k: (g, n, d) or (B, g, n, d).
        v: (g, n, dv) or (B, g, n, dv), of the dtype of q and k.
        r: 1..n.
        scale: positive; None means ``1 / sqrt(d)``.

    Returns:
        Result: output (h, m, dv) or (B, h, m, dv), like q.  The certificate is of kind "none", its bounds infinite: of
        the full scores of the keys left out nothing is known; `attention.audit` can measure.  ``counters`` are of the
        narrow search.

    Raises:
        ArgumentError: shapes, dtypes or heads that do not fit, NaN or infinity, r out of range, deleted keys.

    Example:
        >>> import numpy as np
        >>> from attention.modules import decode_by_index
        >>> from hsr import HSRIndex
        >>> rng = np.random.default_rng(0)
        >>> k, v, narrow = (rng.random((2, 500, width)) for width in (64, 48, 8))
        >>> q, narrow_q = (rng.random((4, 1, width)) for width in (64, 8))
        >>> decode_by_index(narrow_q, HSRIndex(narrow), q, k, v, 32).output.shape
        (4, 1, 48)
    """
    queries, keys = (checks.floats(name, fold(name, x), (3,)) for name, x in (("q", q), ("k", k)))
    values, narrow = Values(fold("v", v)), fold("index_q", index_q)
    names = [checks.dtype_name("q", q), checks.dtype_name("k", k), values.dtype]
    if len(set(names)) > 1:
        raise ArgumentError(f"q, k and v must have one dtype; got {', '.join(names)}")
    if tuple(v.shape[:-1]) != tuple(k.shape[:-1]) or keys.shape[:2] != (index.heads, index.n):
        wanted = f"{index.heads} heads of {index.n} keys, as the index"
        raise ArgumentError(f"k and v must have {wanted}; got {tuple(k.shape)} and {tuple(v.shape)}")
    if index.alive != index.n:
        raise ArgumentError(f"index must hold every key; got one with {index.n - index.alive} of {index.n} deleted")
    if (
        queries.shape[2] != keys.shape[2]
        or tuple(q.shape[:-3]) != tuple(k.shape[:-3])
        or tuple(index_q.shape[:-1]) != tuple(q.shape[:-1])
    ):
        wanted = (
            f"{keys.shape[2]} wide, of the batch of k {tuple(k.shape)}, one for each index_q {tuple(index_q.shape)}"
        )
        raise ArgumentError(f"q must be {wanted}; got {tuple(q.shape)}")
    factor = 1 / math.sqrt(keys.shape[2]) if scale is None else checks.real("scale", scale, math.ulp(0), math.inf)
    report = index.topk(narrow, r)
    scores = _scores(queries, keys, report.offsets, report.indices)
    rows = len(report.offsets) - 1
    run = choose("attend", "numba")
    output, lse, _ = run(report.offsets, report.indices, scores, values.array, np.zeros(rows), Softmax(), factor)
    leading = queries.shape[:2]
    counters = Counters(report.scanned.reshape(leading), report.visited.reshape(leading), report.counts)
    lse, unknown = lse.reshape(leading), np.full(leading, np.inf)
    certificate = Certificate("none", unknown, unknown, unknown, unknown)
    result = Result(output.reshape(*leading, -1), lse, np.isneginf(lse), certificate, counters, index.n)
    return result.shaped(q.shape[:-1], q)


def _scores(queries: np.ndarray, keys: np.ndarray, offsets: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Products of queries (h, m, d) with the listed keys of (g, n, d), row by row: (nnz,) float64."""
    rows, group = queries.reshape(-1, queries.shape[2]).astype(np.float64), len(queries) // len(keys)
    scores = np.empty(len(indices))
    with np.errstate(over="ignore", invalid="ignore"):
        for row, query in enumerate(rows):
            part = slice(offsets[row], offsets[row + 1])
            scores[part] = keys[row // queries.shape[1] // group, indices[part]] @ query
    if not np.isfinite(scores).all():
        raise ArgumentError("q and k must have scores within float64; got products that overflow it")
    return scores


def _within(name: str, ids: torch.Tensor, most: int) -> None:
    least, greatest = int(ids.min()), int(ids.max())
    if least < 0 or greatest > most:
        raise ArgumentError(f"{name} must lie in 0..{most}; got {least}..{greatest}")

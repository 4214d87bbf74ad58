"""What a set of keys looks like, head by head: norms, spectrum, duplicates, and how concentrated attention to it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MASSES = (0.5, 0.9, 0.99)  # shares of a row's attention


class Shape(NamedTuple):
    """Of the keys of one head."""

    norms: tuple[float, float, float]  # least, median, largest
    offset: float  # norm of the mean over the root mean square norm: 1 if all keys are alike
    variances: np.ndarray  # (d,) shares of the variance by principal axis, largest first; zeros where there is none
    zeros: int
    duplicates: int  # keys that equal an earlier one

    @property
    def effective(self) -> float:
        """Participation ratio ``1 / sum of squared shares``: d where all axes are alike, 1 where one has all."""
        total = float((self.variances**2).sum())
        return 1 / total if total else 0.0

    def axes(self, share: float) -> int:
        """How many axes hold that share of the variance."""
        return int(np.searchsorted(self.variances.cumsum(), share - 1e-12) + 1) if self.variances.any() else 0


def shape(keys: np.ndarray) -> Shape:
    """Keys (n, d), n >= 2."""
    largest = float(np.abs(keys).max()) or 1.0
    unit = keys.astype(np.float64) / largest  # so that no square overflows
    norms = np.sqrt(np.einsum("nd,nd->n", unit, unit))
    mean = unit.mean(axis=0)
    centred = unit - mean
    variances = np.linalg.eigvalsh(centred.T @ centred)[::-1].clip(0)
    total = float(variances.sum())
    rows = np.ascontiguousarray(keys + 0.0)  # -0.0 and 0.0 are the same key
    distinct = np.unique(rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))))
    power = float(np.sqrt((norms**2).mean()))
    return Shape(
        tuple(float(value) * largest for value in np.quantile(norms, (0, 0.5, 1))),  # type: ignore[arg-type]
        float(np.linalg.norm(mean)) / power if power else 0.0,
        variances / total if total else variances,
        int((norms == 0).sum()),
        len(keys) - len(distinct),
    )


class Concentration(NamedTuple):
    """Of the attention of one query head's rows."""

    keys: np.ndarray  # (m, len(MASSES)) int64: the fewest keys that hold each share of a row's mass
    perplexity: np.ndarray  # (m,) exp of the entropy: how many equal keys would be as spread
    curve: np.ndarray  # (n,) mean over rows of the mass that the best 1 .. n keys hold


def concentration(queries: np.ndarray, keys: np.ndarray, limits: np.ndarray, scale: float) -> Concentration:
    """Softmax attention of queries (m, d) to keys (n, d), row i seeing ``limits[i]`` of them."""
    held, perplexity = [], []
    curve = np.zeros(len(keys))
    for masses, entropy in _rows(queries, keys, limits, scale):
        held.append(np.searchsorted(masses, MASSES) + 1)
        perplexity.append(np.exp(entropy))
        curve[: len(masses)] += masses
        curve[len(masses) :] += 1
    most = limits[:, None]
    return Concentration(np.minimum(held, most), np.array(perplexity), np.minimum(curve / len(queries), 1))


def _rows(
    queries: np.ndarray, keys: np.ndarray, limits: np.ndarray, scale: float
) -> Iterator[tuple[np.ndarray, float]]:
    """Row by row the mass of the best 1, 2, ... keys, and the entropy in nats."""
    wide = keys.astype(np.float64)
    for query, limit in zip(queries.astype(np.float64), limits, strict=True):
        scores = np.sort(wide[:limit] @ query * scale)[::-1]
        weights = np.exp(scores - scores[0])
        total = weights.sum()
        shares = weights / total
        yield shares.cumsum(), float(np.log(total) - shares @ (scores - scores[0]))

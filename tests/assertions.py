"""One assertion per contract, used by every test of every backend."""

from __future__ import annotations

import numpy as np

from hsr import Report
from hsr.reference import products

UNIT = 2.0**-53


def assert_reports(
    report: Report, queries: np.ndarray, keys: np.ndarray, thresholds: np.ndarray, limits: np.ndarray
) -> None:
    """queries (m, d), keys (n, d) float64: certain members are in, strangers out, the band may go either way.

    The scores are those of the reference up to the band.  The comparison is made on numbers divided by powers of two,
    so that huge and subnormal cases are decided too.
    """
    m, n, d = len(queries), len(keys), keys.shape[1]
    assert report.offsets.dtype == np.int64
    assert report.indices.dtype in (np.int32, np.int64)
    assert report.scores.dtype == np.float64
    assert report.offsets[0] == 0
    assert report.offsets[-1] == len(report.indices) == len(report.scores)
    s, e = products(queries, keys)
    absolute, _ = products(np.abs(queries), np.abs(keys))
    with np.errstate(over="ignore"):
        bound = np.ldexp(thresholds[:, None], -e)
        lost = np.maximum(np.frexp(np.abs(queries).max(axis=1))[1] + np.frexp(np.abs(keys).max())[1] - 980, 0)[:, None]
        floor = np.ldexp(8.0 * (d + 1) * max(1.0, np.abs(keys).max()), np.where(lost > 0, lost + 24, 0) - e - 1074)
        floor = np.where(lost > 0, floor, np.ldexp(8.0 * (d + 1), -e - 1074))
    band = 8 * (d + 1) * UNIT * absolute + floor
    seen = np.arange(n) < limits[:, None]
    inside = (s >= bound) & seen
    possible = (s + band >= bound) & seen
    for i in range(m):
        part = slice(report.offsets[i], report.offsets[i + 1])
        indices, scores = report.indices[part], report.scores[part]
        assert len(np.unique(indices)) == len(indices), "a key is reported twice"
        assert ((indices >= 0) & (indices < n)).all(), "an index is out of range"
        found = np.zeros(n, bool)
        found[indices] = True
        assert not (inside[i] & ~found).any(), f"query {i} lost keys {np.flatnonzero(inside[i] & ~found)}"
        assert not (found & ~possible[i]).any(), f"query {i} reports strangers {np.flatnonzero(found & ~possible[i])}"
        with np.errstate(over="ignore", invalid="ignore"):
            difference = np.ldexp(scores, -e[i, indices]) - s[i, indices]
        finite = np.isfinite(scores) & np.isfinite(difference)
        assert (np.abs(difference[finite]) <= band[i, indices][finite]).all(), "a score is wrong"

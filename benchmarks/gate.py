"""The gate before the clock: a contender whose answer is wrong is not timed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class WrongAnswer(Exception):
    """A contender reported the wrong keys or scores; nothing is timed and nothing is written."""


class Answer(NamedTuple):
    """Reported keys in CSR form: query i has ``indices[offsets[i]:offsets[i + 1]]``."""

    offsets: np.ndarray
    indices: np.ndarray
    scores: np.ndarray


def rounding(queries: np.ndarray, keys: np.ndarray, dtype: type[np.floating]) -> float:
    """What two sums of ``<q, k>`` in the dtype, in any order, can differ by; for any of these queries and keys."""
    norms = [np.sqrt(np.einsum("id,id->i", rows, rows, dtype=np.float64).max()) for rows in (queries, keys)]
    unit = np.finfo(dtype).eps / 2
    return float(4 * (queries.shape[1] + 2) * unit * norms[0] * norms[1])


def require(name: str, answer: Answer, oracle: np.ndarray, threshold: float | np.ndarray, band: float) -> None:
    """Refuse an answer that is not ``{j: oracle[i, j] >= threshold}``, each key once, up to the band.

    Args:
        name: of the contender.
        answer: what it reported for the oracle's queries.
        oracle: (m, n) float64 scores.
        threshold: of every query, or one per query (m,).
        band: keys whose score is this close to the threshold may be in or out; a reported score may be this far off.

    Raises:
        WrongAnswer: says which query, and how.
    """
    if len(answer.offsets) != len(oracle) + 1:
        raise WrongAnswer(f"{name} answered {len(answer.offsets) - 1} queries of {len(oracle)}")
    for i, (scores, bound) in enumerate(zip(oracle, np.broadcast_to(threshold, len(oracle)), strict=True)):
        part = slice(answer.offsets[i], answer.offsets[i + 1])
        found, wanted = answer.indices[part], scores[answer.indices[part]]
        times = np.bincount(found, minlength=len(scores))
        faults = {
            "missed": np.flatnonzero((scores >= bound + band) & (times == 0)),
            "wrongly reported": found[wanted < bound - band],
            "repeated": np.flatnonzero(times > 1),
            "misjudged the score of": found[np.abs(answer.scores[part] - wanted) > band],
        }
        for fault, keys in faults.items():
            if len(keys):
                raise WrongAnswer(f"{name} {fault} {len(keys)} keys of query {i}, key {keys[0]} among them")


def require_rows(name: str, outputs: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Refuse attention outputs (m, dv) of which an entry differs from (m, dv) float64 by more than the tolerance."""
    off = np.abs(outputs - wanted).max(axis=1)
    wrong = np.flatnonzero(~(off <= tolerance))  # a NaN is wrong, too
    if len(wrong):
        raise WrongAnswer(
            f"{name} got {len(wrong)} of {len(wanted)} outputs wrong, row {wrong[0]} by {off[wrong[0]]:.2e}"
        )

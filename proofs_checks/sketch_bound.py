"""Sketch bound: int8 codes never hide a key that reaches the threshold.

Source. This library (`hsr.sketch_numba`).

Hypotheses. Keys k (divided by a power of two), any mean, any axes A (not nor need be orthonormal), any steps and
codes; ``residual = k - mean - A (steps code)``. A query q with ``z = steps (A^T q)``, any sigma and whole numbers a.
Stored per block of 64 keys: ``e``, at least every ``||residual||``, and ``c``, at least every ``||code||``.

Conclusion. (i) ``<q, k> <= <q, mean> + sigma <a, code> + ||z - sigma a|| ||code|| + ||q|| ||residual||``. (ii) The e
and c that the library stores are upper bounds. (iii) The library's report is complete.

Proof. ``<q, A (steps code)> = <z, code> = sigma <a, code> + <z - sigma a, code>``; Cauchy and Schwarz twice.

Check. The library's floats (mean, axes, steps, codes, e, c) are taken as exact rationals. (i) z and the residual are
computed exactly; the norms are irrational, so the inequality is decided by squares. (ii) By squares. (iii) Lattice
keys against whole numbers. Queries are random, or along a key's own residual, which attains the bound; the constants
are the largest ratio of the left side to the right side (both less the terms they share), and of norms to what is
stored.

What this does not show. Tightness on real keys, where codes are good and the last two terms small. The rounding of
the float64 test itself is covered by a slack that only (iii) tests, on lattices; other tests of the sketch try
harder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from hsr.sketch_numba import LEVELS, OFFSET, Sketch, build
from proofs_checks.check import OURS, Check, Extremes, for_all
from proofs_checks.inputs import UNIT
from proofs_checks.rationals import at_most_two_roots, exact, norm_square

Build = Callable[[np.ndarray], Sketch]


@st.composite
def lattices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Keys (n, d) and queries (m, d), whole numbers; up to two blocks, sometimes with an outlier or a common offset."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d = draw(st.one_of(st.integers(1, 12), st.just(70))), draw(st.integers(1, 6))
    keys = rng.integers(-8, 9, (n, d))
    if draw(st.booleans()):
        keys[0] *= 100
    if draw(st.booleans()):
        keys += rng.integers(-1000, 1001, d)
    return keys, rng.integers(-8, 9, (2, d))


def conclude(made: Build, examples: int) -> dict[str, float]:
    """The bound in rationals, the stored norms, and completeness."""
    met = Extremes()
    for_all(lattices(), lambda case: _conclusion(made, *case, met), examples)
    return met


def _conclusion(made: Build, keys: np.ndarray, queries: np.ndarray, met: Extremes) -> float:
    n, d = keys.shape
    sketch = made(keys / UNIT)
    codes = unpacked(sketch, n, d)
    unit_keys = exact(np.ldexp(keys / UNIT, -sketch.exponent))
    mean, axes, steps = exact(sketch.mean), exact(sketch.axes), exact(sketch.steps)
    residual = unit_keys - mean - (exact(codes) * steps) @ axes.T
    closest = 0.0
    shown = range(min(n, 12))
    for j in range(n):
        e, c = (Fraction(float(stored[j // 64])) for stored in (sketch.residual, sketch.norm))
        assert norm_square(residual[j]) <= e**2, f"key {j}: its residual exceeds the stored {float(e):.6g}"
        assert norm_square(exact(codes[j])) <= c**2, f"key {j}: its code's norm exceeds the stored {float(c):.6g}"
        met.largest("||code|| / stored", float(norm_square(exact(codes[j]))) ** 0.5 / float(c) if c else 0)
    for j in shown:
        for q in (exact(queries[0]), residual[j] * 2**20):
            closest = max(closest, _bound(q, unit_keys[j], mean, axes, steps, codes[j], residual[j]))
    _complete(sketch, keys, queries)
    met.largest("bounded terms / their bound", closest)
    return closest


def _bound(
    q: np.ndarray,
    k: np.ndarray,
    mean: np.ndarray,
    axes: np.ndarray,
    steps: np.ndarray,
    code: np.ndarray,
    rest: np.ndarray,
) -> float:
    """The inequality for one query and key, with sigma a power of two; how nearly it is attained."""
    z = steps * (axes.T @ q)
    largest = max(abs(x) for x in z)
    sigma = Fraction(2) ** int(np.ceil(np.log2(float(largest / LEVELS)))) if largest else Fraction(1)
    a = np.array([Fraction(round(x / sigma)) for x in z], object)
    beyond = q @ k - q @ mean - sigma * (a @ exact(code))
    first = norm_square(z - sigma * a) * norm_square(exact(code))
    second = norm_square(q) * norm_square(rest)
    assert at_most_two_roots(beyond, first, second), f"{float(beyond)} exceeds the bound"
    bound = float(first) ** 0.5 + float(second) ** 0.5
    return float(beyond) / bound if bound else 0.0


def _complete(sketch: Sketch, keys: np.ndarray, queries: np.ndarray) -> None:
    products = queries @ keys.T
    bounds = np.sort(products, axis=1)[:, len(keys) // 2]
    limits = np.full(len(queries), len(keys))
    hits = sketch.report(keys / UNIT, queries / UNIT, bounds / UNIT**2, limits, True)
    for i in range(len(queries)):
        found = np.sort(hits.indices[hits.offsets[i] : hits.offsets[i + 1]])
        wanted = np.flatnonzero(products[i] >= bounds[i])
        assert np.array_equal(found, wanted), f"query {i}: {found} reported, {wanted} inside"


def unpacked(sketch: Sketch, n: int, d: int) -> np.ndarray:
    """The codes (n, d) in key order."""
    blocks, groups, size, axes = sketch.codes.shape
    return sketch.codes.transpose(0, 2, 1, 3).reshape(blocks * size, groups * axes)[:n, :d].astype(np.int64) - OFFSET


def _smaller_residual(keys: np.ndarray) -> Sketch:
    sketch = build(keys)
    return dataclasses.replace(sketch, residual=sketch.residual * 0.99)


def _no_norm(keys: np.ndarray) -> Sketch:
    sketch = build(keys)
    return dataclasses.replace(sketch, norm=sketch.norm * 0)


def _wrong_codes(keys: np.ndarray) -> Sketch:
    sketch = build(keys)
    return dataclasses.replace(sketch, codes=np.ascontiguousarray(sketch.codes[:, :, ::-1]))


CHECK = Check(
    statement="Sketch bound: int8 codes hide no key",
    source=OURS,
    evidence="exact rationals of the stored floats",
    conclude=conclude,
    operations={"hsr.sketch_numba.build": build},
    faults={
        "stored residuals 1 % too small": _smaller_residual,
        "stored code norms of 0": _no_norm,
        "codes of other keys": _wrong_codes,
    },
)

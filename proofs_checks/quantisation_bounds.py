"""Quantisation bounds: what a rounded key says about a score, in the L1 form and in the L2 form.

Source. This library, which rests its sketch on the L2 form with stored error (`sketch_bound`); both forms are
folklore.

Hypotheses. Keys rounded to the nearest multiple of a step, ``khat = step code``, no clipping for the L1 form; for the
L2 form any khat at all, with the error ``e = ||k - khat||_2`` stored.

Conclusion.

    L1    |<q, k> - <q, khat>| <= (step / 2) ||q||_1
    L2    |<q, k> - <q, khat>| <= ||q||_2 e

and neither constant can be lowered: keys half-way between two codes, on the side of q's signs, attain the first;
queries along ``k - khat`` the second.

Proof. Hoelder: each coordinate of ``k - khat`` is at most step / 2; Cauchy and Schwarz.

Check. Rationals throughout; the L2 form is compared by squares. The operation is the rounding. The constants are the
largest ratios met by a directed search, and those of the extremal examples, which are 1 exactly.

What this does not show. That the codes of a real sketch are nearest multiples: the sketch clips outliers and works in
rotated axes, and rests on the L2 form alone. Rounding of float arithmetic is `sketch_bound`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from hypothesis import strategies as st

from proofs_checks.check import OURS, Check, Extremes, for_all

Rounding = Callable[[Fraction, Fraction], int]  # x, step -> code
Pair = tuple[list[Fraction], list[Fraction]]  # query, key


def nearest(x: Fraction, step: Fraction) -> int:
    """The code of the nearest multiple of the step; ties to even."""
    return round(x / step)


def conclude(code: Rounding, examples: int) -> dict[str, float]:
    """Both bounds on drawn pairs, then the extremal examples."""
    met = Extremes()
    entry = st.fractions(-4, 4, max_denominator=64)
    step = st.sampled_from((Fraction(1, 3), Fraction(1), Fraction(5, 2)))
    pairs = st.lists(st.tuples(entry, entry), min_size=1, max_size=4)
    for_all(
        st.tuples(pairs, step),
        lambda case: max(_ratios(code, ([q for q, _ in case[0]], [k for _, k in case[0]]), case[1], met)),
        examples,
    )
    half = Fraction(1, 2)
    l1, _ = _ratios(code, ([Fraction(3), Fraction(-2)], [half, -half]), Fraction(1), met)
    _, l2 = _ratios(code, ([Fraction(3, 8), Fraction(1, 4)], [Fraction(3, 8), Fraction(1, 4)]), Fraction(1), met)
    assert (l1, l2) == (1, 1), "the extremal examples attain the bounds"
    return met


def _ratios(code: Rounding, pair: Pair, step: Fraction, met: Extremes) -> tuple[float, float]:
    q, k = pair
    residual = [x - step * code(x, step) for x in k]
    error = abs(sum((a * b for a, b in zip(q, residual, strict=True)), Fraction(0)))
    l1 = step / 2 * sum((abs(a) for a in q), Fraction(0))
    l2_square = sum((a * a for a in q), Fraction(0)) * sum((b * b for b in residual), Fraction(0))
    assert error <= l1, f"error {error} exceeds the L1 bound {l1}: q = {q}, k = {k}, step {step}"
    assert error**2 <= l2_square, f"error {error} exceeds the L2 bound, square {l2_square}"
    ratios = float(error / l1) if l1 else 0.0, float(error**2 / l2_square) ** 0.5 if l2_square else 0.0
    met.largest("error / L1 bound", ratios[0])
    met.largest("error / L2 bound", ratios[1])
    return ratios


def _towards_zero(x: Fraction, step: Fraction) -> int:
    return int(x / step)


def _clipped(x: Fraction, step: Fraction) -> int:
    return max(-1, min(1, nearest(x, step)))


CHECK = Check(
    statement="Quantisation bounds: L1 and L2 forms",
    source=OURS,
    evidence="exact rationals",
    conclude=conclude,
    operations={"rounding to nearest": nearest},
    faults={
        "rounding towards zero": _towards_zero,
        "codes clipped without notice": _clipped,
    },
)

"""A known exponent is recovered, and its interval covers it about as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fit import LEVEL, fitted
from benchmarks.ledger import EMPTY, MILLI, RULES, Costs, Ledger, Series, theories

SIZES = [1 << e for e in range(12, 21)]
TRIALS = 300


def noisy(rng: np.random.Generator, exponent: float, m: int = 32) -> list[np.ndarray]:
    """Costs of mean ``7 n**exponent``, spread as widely as those of a tree's queries."""
    return [7 * n**exponent * rng.lognormal(-0.125, 0.5, m) for n in SIZES]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_power_without_noise_is_recovered_exactly(exponent: float) -> None:
    fit = fitted(SIZES, [np.full(5, 3.0 * n**exponent) for n in SIZES], np.random.default_rng(0))
    np.testing.assert_allclose(fit, exponent, atol=1e-12)


def test_the_interval_covers_the_truth_at_the_stated_rate() -> None:
    rng = np.random.default_rng(1)
    fits = [fitted(SIZES, noisy(rng, 0.8), rng) for _ in range(TRIALS)]
    covered = np.mean([fit.low <= 0.8 <= fit.high for fit in fits])
    deviation = np.sqrt(LEVEL * (1 - LEVEL) / TRIALS)
    assert LEVEL - 0.02 - 3 * deviation <= covered <= LEVEL + 3 * deviation  # 0.02: the bootstrap of 32 is that short
    assert np.mean([fit.exponent for fit in fits]) == pytest.approx(0.8, abs=0.005)


def test_the_interval_narrows_with_more_queries_and_misses_another_exponent() -> None:
    rng = np.random.default_rng(2)
    few, many = (fitted(SIZES, noisy(rng, 0.5, m), rng) for m in (16, 1024))
    assert many.high - many.low < (few.high - few.low) / 3
    assert not many.low <= 0.55 <= many.high


def test_theory_has_the_papers_exponents() -> None:
    def of(kind: str, d: int, rule: str) -> dict[str, float]:
        return theories(Series(kind, "gaussian", d, rule, "tree"), SIZES)

    assert [of("query", d, "64")["theory"] for d in (2, 3, 4, 6, 8, 64)] == [0, 0, 0.5, 1 - 1 / 3, 0.75, 1 - 1 / 32]
    assert (of("query", 2, "64")["theory_output"], of("query", 2, "n^0.8")["theory_output"]) == (0.0, 0.8)
    assert of("prefill", 4, "n^0.8")["theory"] == 1.5
    assert of("prefill", 4, "n^0.8")["theory_output"] == 1.8
    assert 0.05 < of("query", 2, "64")["theory_log"] < 0.12


def test_a_ledger_makes_uniform_rows_and_two_fits_per_series_of_several_sizes() -> None:
    ledger, rng = Ledger(), np.random.default_rng(3)
    growing, single = (Series("query", "gaussian", 4, "64", method) for method in ("tree", "brute"))
    rows = []
    for n in SIZES:
        work = np.full(8, float(n**0.5))
        rows.append(ledger.row(growing, n, Costs(work / MILLI, 0.25 * work, 0.75 * work, np.full(8, 64))))
    rows.append(ledger.row(single, 4096, Costs(*np.ones((4, 8)))))
    fits = list(ledger.fits(rng))
    assert all(list(row) == list(EMPTY) for row in rows + fits)
    assert rows[0]["ms"] == pytest.approx(SIZES[0] ** 0.5)
    assert [fit["quantity"] for fit in fits] == ["work", "ms"]
    for fit in fits:
        assert (fit["kind"], fit["of"], fit["method"], fit["n"]) == ("fit", "query", "tree", None)
        assert fit["exponent"] == pytest.approx(0.5)


def test_the_papers_rank_is_the_policys() -> None:
    assert [RULES["n^0.8"].keys(n) for n in (1, 32, 1 << 20)] == [1, 16, 1 << 16]

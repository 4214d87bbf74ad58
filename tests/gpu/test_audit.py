"""Audits on a GPU, or interpreted: what they say is what `attention.audit_bounds` says of the same errors."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import BlockSampled, Dense, audit, prefill  # noqa: E402
from attention.audit_bounds import Estimate, estimates, relative_error, sums_error  # noqa: E402
from attention.weights import Softmax  # noqa: E402
from gpu import audit_bounds, prompt  # noqa: E402
from gpu.audited import audited  # noqa: E402
from hsr.errors import ArgumentError  # noqa: E402
from tests.gpu.interpreted import (  # noqa: E402
    HERE,
    normal,
    poisoned_allocations,  # noqa: F401
    pytestmark,
    waiting_is_an_error,
)

pytestmark = [*pytestmark, pytest.mark.usefixtures("poisoned_allocations")]
QUANTITIES = ("dropped", "error", "exceeding")
NUMBERS = [field.name for field in dataclasses.fields(Estimate)]
FEW = {"max_examples": 200 if HERE == "cuda" else 8}  # interpreted, a head's bounds take seconds


class Case(NamedTuple):
    """Of rows (H, s) that were drawn of m; float32."""

    output: Any  # (H, m, d)
    lse: Any  # (H, m)
    exact: Any  # (H, s, d)
    exact_lse: Any  # (H, s)
    rows: np.ndarray


def case(errors, m, seed=0, d=64):
    """Exact rows that are off the rows drawn by errors (H, s); all m rows of an output are one row."""
    rng = np.random.default_rng(seed)
    errors = torch.from_numpy(np.asarray(errors, np.float32))
    rows = np.stack([rng.choice(m, errors.shape[1], replace=False) for _ in errors])
    output = normal(len(errors), 1, d, seed=seed).cpu()
    lse = normal(len(errors), m, seed=seed).cpu()
    exact_lse = lse.gather(1, torch.from_numpy(rows)) + errors
    parts = output.expand(-1, m, -1), lse, (output * (1 + errors[..., None])), exact_lse
    return Case(*(part.to(HERE) for part in parts), rows)


def both(case, tolerance=0.1, delta=0.05):
    """Estimates made here, and by definition, of the same errors."""
    heads, m = case.lse.shape
    found = audit_bounds.awaited(*case[:2], case[2:4], case.rows, tolerance, delta, (heads,))
    at = torch.from_numpy(case.rows).to(HERE)
    picked = case.output.gather(1, at[..., None].expand(-1, -1, case.output.shape[2])), case.lse.gather(1, at)
    output, lse, exact, exact_lse = (part.double().cpu().numpy() for part in (*picked, *case[2:4]))
    with np.errstate(invalid="ignore"):  # a difference of infinities
        errors = sums_error(lse, exact_lse), relative_error(output, exact)
    return found, estimates(*errors, tolerance, m, delta, (heads,))


def assert_alike(found, wanted):
    for quantity in QUANTITIES:
        one, other = getattr(found, quantity), getattr(wanted, quantity)
        for name in NUMBERS:
            part, true = getattr(one, name), getattr(other, name)
            assert np.shape(part) == np.shape(true)
            assert np.allclose(part, true, rtol=1e-12, atol=1e-12), (quantity, name, part, true)


@settings(**FEW)
@given(
    heads=st.integers(1, 2),
    drawn=st.sampled_from([1, 2, 16, 17, 65]),
    more=st.sampled_from([0, 1, 7, 1000, 200_000]),
    values=st.sampled_from([(0.0,), (0.25,), (0.0, 1e-6), (0.0, 0.01, 3.0), (5.0,), (-1.0, 0.0)]),
    tolerance=st.sampled_from([0.0, 0.1, 0.25]),
    delta=st.sampled_from([0.5, 0.05, 1e-9]),
    seed=st.integers(0, 99),
)
def test_bounds_are_those_of_the_definition(heads, drawn, more, values, tolerance, delta, seed):
    """Without errors, with ties, constant ones and large ones; of one row and of all."""
    errors = np.random.default_rng(seed).choice(values, (heads, drawn))
    assert_alike(*both(case(errors, drawn + more, seed), tolerance, delta))


@pytest.mark.parametrize(("drawn", "m"), [(1, 9), (16, 32768), (65, 32768), (65, 80)])
@pytest.mark.parametrize("values", [(0.0,), (0.0, 0.02, 3.0)])
def test_bounds_of_few_and_of_many_draws(drawn, m, values):
    errors = np.random.default_rng(drawn).choice(values, (1, drawn))
    assert_alike(*both(case(errors, m)))


@pytest.mark.slow
def test_bounds_of_more_heads_than_are_added_at_once():
    errors = np.random.default_rng(0).choice((0.0, 0.02, 3.0), (audit_bounds.OVERALL["STRATA"] + 1, 5))
    assert_alike(*both(case(errors, 4000)))


def test_every_kind_of_wrong_row_counts_as_wrong():
    """All rows drawn: NaN, infinity, rows that are or should be zero, and sums of nothing."""
    made = case(np.zeros((1, 10)), 10)
    output, lse = made.output.clone(), made.lse.clone()
    exact, exact_lse = made.exact.clone(), made.exact_lse.clone()
    at = made.rows[0].tolist()
    output[0, at[0], 3] = torch.nan
    output[0, at[1], 3] = torch.inf
    output[0, at[2]] = 0.0
    exact[0, 3] = 0.0
    output[0, at[4]], exact[0, 4] = 0.0, 0.0
    output[0, at[5]] *= 3e38  # whose square overflows float32
    lse[0, at[6]], lse[0, at[7]], exact_lse[0, 8] = torch.nan, -torch.inf, -torch.inf
    lse[0, at[9]], exact_lse[0, 9] = -torch.inf, -torch.inf
    found, wanted = both(Case(output, lse, exact, exact_lse, made.rows))
    assert found.error.values[0].tolist() == [1, 1, 1, 1, 0, 1, 0, 0, 0, 0]
    assert found.dropped.values[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    assert_alike(found, wanted)


def test_the_tolerance_is_not_exceeded_by_an_error_equal_to_it():
    made = case(np.zeros((1, 1)), 1)
    made.exact[0, 0] = 0.0
    made.exact[0, 0, 0], made.output[0, 0] = 4.0, made.exact[0, 0]
    made.output[0, 0, 0] = 5.0
    assert both(made, tolerance=0.25)[0].exceeding.values.tolist() == [[0.0]]
    assert both(made, tolerance=np.nextafter(0.25, 0))[0].exceeding.values.tolist() == [[1.0]]


def prompts(B=1, h=4, g=2, m=300, n=300, d=64, dtype=torch.float16):
    return tuple(
        normal(B, heads, size, d, seed=i).to(dtype) for i, (heads, size) in enumerate(((h, m), (g, n), (g, n)))
    )


@pytest.mark.parametrize("shape", [{}, {"B": 2, "m": 70, "n": 160}])
def test_an_audit_sees_a_result_and_its_faults(shape):
    """All rows drawn, so that nothing is left to chance: against dense attention in float64."""
    q, k, v = prompts(**shape)
    result = prompt.prompt(q, k, v, Dense(), None)
    output, lse = result.output.clone(), result.lse.clone()
    output[-1, 3, 17] *= 1.5
    lse[-1, 2, 5] += 0.5
    seen = audited(q, k, v, True, Softmax(), None)
    (B, h, m), lead = q.shape[:3], tuple(q.shape[:2])
    rows = np.stack([np.random.default_rng(i).permutation(m) for i in range(B * h)])
    found = seen.estimates(dataclasses.replace(result, output=output, lse=lse), rows, 0.1, 0.05)
    assert found.error.values.shape == (*lead, m) and found.error.upper.shape == lead
    wrong = np.argwhere(found.error.values > 0.1)
    assert wrong[:, :2].tolist() == [[B - 1, 3]] and rows[B * h - 1][wrong[0, 2]] == 17
    assert found.error.values[tuple(wrong[0])] == pytest.approx(0.5, abs=0.01)
    assert np.sort(found.error.values, axis=None)[-2] < 3e-3
    wrong = np.argwhere(found.dropped.values > 0.1)
    assert wrong[:, :2].tolist() == [[B - 1, 2]] and rows[B * h - 2][wrong[0, 2]] == 5
    assert found.dropped.values[tuple(wrong[0])] == pytest.approx(np.expm1(0.5), abs=0.01)
    assert np.sort(found.dropped.values, axis=None)[-2] < 1e-3
    assert found.exceeding.upper[-1, 3] == pytest.approx(1 / m)


def test_what_cannot_be_audited_is_refused():
    q, k, v = prompts(m=20, n=20)
    result = prompt.prompt(q, k, v, Dense(), None)
    seen, rows = audited(q, k, v, True, Softmax(), None), np.zeros((4, 1), np.int64)
    for selection, message in (
        (
            dataclasses.replace(result, output=result.output[:, :, :7]),
            r"output \(1, 4, 20, 64\) to match q; got \(1, 4, 7",
        ),
        (dataclasses.replace(result, lse=result.lse[:, :3]), r"lse \(1, 4, 20\) to match q; got \(1, 3, 20\)"),
        (Dense(), "a Result of .*; got Dense"),
    ):
        with pytest.raises(ArgumentError, match=message):
            seen.estimates(selection, rows, 0.1, 0.05)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_before_an_estimate_is_read():
    q, k, v = prompts(m=3000, n=3000, dtype=torch.bfloat16)
    result = prefill(q, k, v, policy=BlockSampled(density=0.5))
    wanted = audit(q, k, v, result)
    with waiting_is_an_error():
        found = audit(q, k, v, result)
    assert_alike(found.found, wanted.found)
    assert found.passes(max_error=wanted.error.overall_upper)

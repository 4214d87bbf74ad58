"""Audits on a GPU, or interpreted: what they say is what `attention.audit_bounds` says of the same errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle

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
from gpu.audit_errors import measure  # noqa: E402
from gpu.audited import audited  # noqa: E402
from gpu.exact_rows import exact_rows, parts  # noqa: E402
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


def both(values, m, tolerance=0.1, delta=0.05):
    """Estimates made here, and by definition, of the same errors of sums and of outputs, (2, H, s) float64."""
    heads, drawn = values.shape[1:]
    told = torch.from_numpy(audit_bounds.settings(heads, m, tolerance, delta)).to(HERE)
    packed = torch.empty(sum(audit_bounds.sizes(heads, drawn)), dtype=torch.float64, device=HERE)
    every = np.concatenate([values, values[1:] > tolerance]).ravel()
    packed[: every.size] = torch.from_numpy(every).to(HERE)
    found = audit_bounds.awaited(packed, told, (heads, drawn), m, delta, tolerance, (1, heads))
    return found, estimates(*values, tolerance, m, delta, (1, heads))


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
    more=st.sampled_from([0, 1, 7, 1000, 2**31 - 100]),
    values=st.sampled_from([(0.0,), (0.25,), (0.0, 1e-300), (0.0, 0.01, 1.0), (1.0,), (0.1, 0.2, 0.3)]),
    tolerance=st.sampled_from([0.0, 0.1, 0.25]),
    delta=st.sampled_from([0.5, 0.05, 1e-9]),
    seed=st.integers(0, 99),
)
def test_bounds_are_those_of_the_definition(heads, drawn, more, values, tolerance, delta, seed):
    """Without errors, with ties, constant ones and none but the worst; of one row and of all."""
    errors = np.random.default_rng(seed).choice(values, (2, heads, drawn))
    assert_alike(*both(errors, drawn + more, tolerance, delta))


@pytest.mark.parametrize(("drawn", "m"), [(1, 9), (16, 32768), (65, 32768), (65, 80)])
@pytest.mark.parametrize("values", [(0.0,), (0.0, 0.02, 1.0)])
def test_bounds_of_few_and_of_many_draws(drawn, m, values):
    assert_alike(*both(np.random.default_rng(drawn).choice(values, (2, 1, drawn)), m))


@pytest.mark.slow
def test_bounds_of_more_heads_than_are_added_at_once():
    heads = audit_bounds.OVERALL["STRATA"] + 1
    assert_alike(*both(np.random.default_rng(0).choice((0.0, 0.02, 1.0), (2, heads, 5)), 4000))


def measured(q, k, v, output, lse, rows, tolerance=0.1):
    """Errors (3, H, s) of an output (H, m, d) and lse (H, m) in rows (H, s), and by definition."""
    scale, exact = q.shape[3] ** -0.5, [part.flatten(0, 1) for part in exact_rows(q, k, v, rows, q.shape[3] ** -0.5)]
    values = torch.empty(3 * rows.size, dtype=torch.float64, device=HERE)
    measure(
        parts(q, k, v, rows, scale), output, lse, torch.tensor([tolerance], dtype=torch.float64, device=HERE), values
    )
    at = torch.from_numpy(rows).to(HERE)
    picked = output.gather(1, at[..., None].expand(-1, -1, q.shape[3])), lse.gather(1, at)
    output, lse, exact, sums = (part.double().cpu().numpy() for part in (*picked, *exact))
    with np.errstate(invalid="ignore"):  # a difference of infinities
        dropped, error = sums_error(lse, sums), relative_error(output, exact)
    return values.view(3, *rows.shape).cpu().numpy(), np.stack([dropped, error, error > tolerance])


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.float16), (128, torch.float32), (256, torch.float16)])
def test_errors_are_those_of_the_definition(d, dtype):
    """In the order of drawing, of a batch and of groups of heads."""
    q, k, v = prompts(B=2, m=150, n=400, d=d)
    rng = np.random.default_rng(d)
    rows = np.stack([rng.permutation(150)[:70] for _ in range(8)])
    output, lse = normal(8, 150, d).to(dtype), normal(8, 150, seed=1)
    exact, sums = (part.flatten(0, 1) for part in exact_rows(q, k, v, rows, d**-0.5))
    for head in range(8):
        near = 1 + 0.2 * normal(70, seed=head)
        output[head, rows[head]] = (exact[head] * near[:, None]).to(dtype)
        lse[head, rows[head]] = sums[head] + (near - 1)
    found, wanted = measured(q, k, v, output, lse, rows)
    assert 0 < wanted[2].mean() < 1
    assert np.allclose(found, wanted, rtol=1e-12, atol=1e-15)


def test_every_kind_of_wrong_row_counts_as_wrong():
    """NaN, infinity, rows that are or should be zero, and sums of nothing."""
    q, k, v = prompts(h=1, g=1, m=10, n=10)
    v[:, :, :2] = 0
    rows = np.random.default_rng(0).permutation(10)[None]
    at = {int(row): place for place, row in enumerate(rows[0])}
    output, lse = normal(1, 10, 64), normal(1, 10)
    exact, sums = (part.flatten(0, 1) for part in exact_rows(q, k, v, rows, 64**-0.5))
    output[0, rows[0]], lse[0, rows[0]] = exact[0], sums[0]
    output[0, 0] = 1e-30
    for row, wrong in ((2, torch.nan), (3, torch.inf), (4, -3e38)):  # whose square overflows float32
        output[0, row, 5] = wrong
    output[0, 5] = 0.0
    lse[0, 6], lse[0, 7], lse[0, 8] = torch.nan, -torch.inf, 1e30
    found, wanted = measured(q, k, v, output, lse, rows)
    assert [found[1, 0, at[row]] for row in range(10)] == [1, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert [found[0, 0, at[row]] for row in range(10)] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    assert np.array_equal(found, wanted)


def test_the_tolerance_is_not_exceeded_by_an_error_equal_to_it():
    q, k, v = prompts(h=1, g=1, m=1, n=1)
    v[:] = 0
    v[..., 0] = 4
    output = v[0].clone()
    output[..., 0] = 5
    for tolerance, exceeds in ((0.25, 0.0), (np.nextafter(0.25, 0), 1.0)):
        found, _ = measured(q, k, v, output, normal(1, 1), np.zeros((1, 1), np.int64), tolerance)
        assert found[1:].ravel().tolist() == [0.25, exceeds]


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


def test_results_are_read_whatever_their_strides():
    q, k, v = prompts(B=2, m=40, n=60)
    result = prompt.prompt(q, k, v, Dense(), None)
    turned = dataclasses.replace(
        result,
        output=result.output.transpose(1, 3).contiguous().transpose(1, 3),
        lse=result.lse.transpose(1, 2).contiguous().transpose(1, 2),
    )
    rows = np.stack([np.random.default_rng(i).permutation(40)[:30] for i in range(8)])
    wanted, found = (
        audited(q, k, v, True, Softmax(), None).estimates(one, rows, 0.1, 0.05) for one in (result, turned)
    )
    assert_alike(found, wanted)
    assert found.error.overall_upper < 0.2
    with pytest.raises(ArgumentError, match=r"lse on .*; got ndarray"):
        audited(q, k, v, True, Softmax(), None).estimates(
            dataclasses.replace(result, lse=result.lse.cpu().numpy()), rows, 0.1, 0.05
        )


def test_estimates_may_be_copied_and_printed():
    found, wanted = both(np.random.default_rng(0).uniform(size=(2, 1, 4)), 9)
    assert "tensor" not in repr(found) and "overall_upper" in repr(found)
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert_alike(copied, wanted)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_before_an_estimate_is_read():
    q, k, v = prompts(m=3000, n=3000, dtype=torch.bfloat16)
    result = prefill(q, k, v, policy=BlockSampled(density=0.5))
    wanted = audit(q, k, v, result)
    with waiting_is_an_error():
        found = audit(q, k, v, result)
    assert_alike(found.found, wanted.found)
    assert found.passes(max_error=wanted.error.overall_upper)

"""vAttention against its paper, given the same random orders, and the laws of its samples.

Tests of randomness have fixed seeds; were these drawn anew, each would fail of itself with probability below 1e-6.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from attention.draws import permutation
from attention.selectors.v_attention import VAttention, places
from hsr.errors import ArgumentError
from tests.caches import KINDS, Cache, assert_folds, assert_serves, begun, cache, chosen_by, scores, sets, weights

ALARM = 1e-6
BARE = VAttention(eps=0.2, delta=0.1, heavy=0.0, base=0.3, sinks=0, recent=0, seed=3)
every = pytest.mark.parametrize("policy", [*VAttention.examples(), BARE], ids=str)


def reference(made: Cache, head: int, policy: VAttention) -> dict[int, float]:
    """Log weights by token."""
    n, exact = made.k.shape[1], scores(made, head)
    fixed = {j for j in range(n) if j < policy.sinks or j >= n - policy.recent}
    middle = sorted(set(range(n)) - fixed, key=lambda j: -exact[j])
    heavy = math.ceil(policy.heavy * len(middle))
    kept, rest = fixed | set(middle[:heavy]), set(middle[heavy:])
    first, second = (
        [j for j in permutation(policy.seed, 2 * n + which, n, made.k.device).tolist() if j in rest] for which in (0, 1)
    )
    told = np.exp(exact[first[: max(2, math.ceil(policy.base * len(rest)))]])
    total = np.exp(exact[sorted(kept)]).sum() + len(rest) * told.mean()
    quantile = stats.norm.ppf(1 - policy.delta / 2)
    needed = math.ceil((quantile * told.std(ddof=1) * len(rest) / (policy.eps * total)) ** 2)
    b = min(max(needed, 1), len(rest))
    return dict.fromkeys(kept, 0.0) | dict.fromkeys(second[:b], math.log(len(rest) / b))


@every
@pytest.mark.parametrize("kind", ["gaussian", "grouped", "offset"])
def test_it_is_the_paper(policy: VAttention, kind: str) -> None:
    made = cache(1, 420, kind, group=3)
    steps = begun(policy, made.first(300), (100, 200))
    for end in (300, 350, 420):
        now = made.first(end)
        steps.append(*now[1:3])
        lists = steps.choose(*now[:3])
        for head in range(6):
            assert weights(lists, head) == pytest.approx(reference(now, head, policy), abs=1e-6)


def test_places_count_those_before() -> None:
    random = np.random.default_rng(0)
    among, order = random.random((3, 20)) < 0.5, random.permutation(20)
    found = places(torch.from_numpy(among), torch.from_numpy(order))
    for line, j in np.ndindex(3, 20):
        before = order[: list(order).index(j)]
        assert found[line, j] == among[line, before].sum()


def runs_of(policy: VAttention, made: Cache, count: int) -> list[list[dict[int, float]]]:
    """Log weights of each head for as many seeds."""
    found = []
    for seed in range(count):
        lists = chosen_by(dataclasses.replace(policy, seed=seed), made)
        found.append([weights(lists, head) for head in range(len(made.q))])
    return found


def test_numerator_and_denominator_are_unbiased() -> None:
    """Over 1,500 seeds, by z-tests on sums of weights and of weighted values; b varies from seed to seed."""
    policy = VAttention(eps=0.05, delta=0.4, heavy=0.03, base=0.05, sinks=4, recent=4)
    made = cache(2, 250, "gaussian", group=1)
    runs = runs_of(policy, made, 1500)
    assert len({len(run[0]) for run in runs}) > 10
    checks = 2 * (1 + made.v.shape[2])
    for head in range(2):
        mass = np.exp(scores(made, head))
        rows = np.column_stack([mass, mass[:, None] * made.v[head].numpy()])  # (n, 1 + dv)
        sums = np.array([sum(math.exp(log) * rows[j] for j, log in run[head].items()) for run in runs])
        z = (sums.mean(axis=0) - rows.sum(axis=0)) / (sums.std(axis=0, ddof=1) / len(runs) ** 0.5)
        assert abs(z).max() < stats.norm.isf(ALARM / 2 / checks)


def test_every_key_of_the_residual_is_as_likely() -> None:
    """How often each is drawn by 2,000 seeds, where all weights are equal, so that b is 1, by a binomial test."""
    policy = VAttention(heavy=0.0, sinks=1, recent=1)
    runs = runs_of(policy, cache(3, 42, "same", g=1, group=1), 2000)
    counts = np.zeros(42)
    for run in runs:
        assert len(run[0]) == 3
        counts[list(run[0])] += 1
    assert counts[0] == counts[41] == 2000
    low, high = stats.binom.interval(1 - ALARM / 40, 2000, 1 / 40)
    assert ((counts[1:41] >= low) & (counts[1:41] <= high)).all()


@pytest.mark.parametrize(("eps", "delta"), [(0.1, 0.2), (0.2, 0.1)])
def test_the_denominator_is_within_eps(eps: float, delta: float) -> None:
    """In at least 1 - delta of 400 seeds, less what chance allows the count at that rate.

    The first sample is large, so that what it tells of sigma and D is near the truth.
    """
    policy = VAttention(eps, delta, heavy=0.02, base=0.5, sinks=4, recent=4)
    made = cache(4, 400, "gaussian", group=1)
    failures = np.zeros(2)
    for run in runs_of(policy, made, 400):
        for head in range(2):
            mass = np.exp(scores(made, head))
            estimate = sum(math.exp(log) * mass[j] for j, log in run[head].items())
            failures[head] += abs(estimate / mass.sum() - 1) > eps
    assert failures.max() <= stats.binom.isf(ALARM / 2, 400, delta)


def test_a_smaller_error_takes_more_keys() -> None:
    made = cache(5, 500, "gaussian")
    sizes = [
        sum(map(len, sets(chosen_by(VAttention(eps=eps, sinks=8, recent=8), made)))) for eps in (0.5, 0.2, 0.1, 1e-6)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == 4 * 500


def test_seeds_and_numbers_of_tokens_draw_anew_and_the_same_the_same() -> None:
    """Of equal keys one is drawn: 40 times of about 400, so that more than a few alike would be strange."""
    made, policy = cache(6, 440, "same"), VAttention(heavy=0.0, sinks=0, recent=0)
    by_n = [tuple(*sets(chosen_by(policy, made.first(n)))[:1]) for n in range(400, 440)]
    by_seed = [tuple(run[0]) for run in runs_of(policy, made, 40)]
    assert {len(drawn) for drawn in by_n + by_seed} == {1}
    assert len(set(by_n)) > 30 and len(set(by_seed)) > 30
    assert by_n == [tuple(*sets(chosen_by(policy, made.first(n)))[:1]) for n in range(400, 440)]


def test_few_keys_are_all_attended_to() -> None:
    for n in (1, 20, 256, 257):
        lists = chosen_by(VAttention(heavy=1.0), cache(7, n))
        assert sets(lists) == [set(range(n))] * 4
    assert VAttention().bytes_read(1000, 128, 2) == 256000


def test_one_key_of_a_residual_stands_for_itself() -> None:
    lists = chosen_by(VAttention(heavy=0.0, sinks=3, recent=3), cache(8, 7))
    assert weights(lists, 0) == dict.fromkeys(range(7), 0.0)


@every
@pytest.mark.parametrize("kind", KINDS)
def test_it_serves(policy: VAttention, kind: str) -> None:
    assert_serves(policy, kind)


@every
def test_a_batch_is_as_its_sequences_alone(policy: VAttention) -> None:
    assert_folds(policy)


WRONG = {
    "eps": (0, -1, math.nan),
    "delta": (0, 1),
    "heavy": (-0.1, 1.1),
    "base": (0, 1.1),
    "sinks": (-1,),
    "recent": (1.5,),
    "seed": (-1,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} must be"):
        VAttention(**{name: value})  # type: ignore[arg-type]

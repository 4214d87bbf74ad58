"""MagicPIG against its paper, given the same directions, and the law of its samples.

Tests of randomness have fixed seeds; were these drawn anew, each would fail of itself with probability below 1e-6.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from attention.selectors.magic_pig import MagicPIG, MagicPIGSteps, log_chance
from hsr.errors import ArgumentError
from tests.caches import (
    KINDS,
    Cache,
    assert_folds,
    assert_serves,
    begun,
    cache,
    chosen_by,
    of_keys,
    scores,
    sets,
    weights,
)

ALARM = 1e-6
BARE = MagicPIG(planes=3, tables=5, sinks=0, recent=0, refresh=7, seed=2)
every = pytest.mark.parametrize("policy", [*MagicPIG.examples(), BARE], ids=str)


def hashes(x: np.ndarray, directions: np.ndarray, policy: MagicPIG) -> np.ndarray:
    """Signs in each table, (n, L, K) bool."""
    return (x @ directions > 0).reshape(len(x), policy.tables, policy.planes)


def chances(q: np.ndarray, keys: np.ndarray, policy: MagicPIG) -> np.ndarray:
    """Of two collisions or more with each key, (n,)."""
    lengths = np.linalg.norm(q) * np.linalg.norm(keys, axis=1)
    cosines = np.divide(keys @ q, lengths, out=np.zeros(len(keys)), where=lengths > 0)
    agree = (1 - np.arccos(np.clip(cosines, -1, 1)) / np.pi) ** policy.planes
    return stats.binom.sf(1, policy.tables, agree)


@every
@pytest.mark.parametrize("kind", ["gaussian", "grouped", "offset", "zero"])
@pytest.mark.parametrize("first", [1, 300, 420])
def test_it_is_the_paper(policy: MagicPIG, kind: str, first: int) -> None:
    n = 420
    made = cache(1, n, kind, group=3)
    steps = begun(policy, made, (first, *range(first + 5, n, 5)))
    assert isinstance(steps, MagicPIGSteps)
    lists = steps.choose(*made[:3])
    prompt = max(0, first - policy.sinks - policy.recent)
    hashed = prompt + max(0, (n - policy.sinks - policy.recent - prompt) // policy.refresh * policy.refresh)
    assert steps.known == policy.sinks + hashed
    for head in range(6):
        keys, q = of_keys(made, head)[policy.sinks : policy.sinks + hashed], made.q[head].numpy()
        centred = keys - (keys[:prompt].mean(axis=0) if prompt else 0)
        codes, asked = (hashes(x, steps.directions.numpy(), policy) for x in (centred, q[None]))
        hits = (codes == asked).all(axis=2).sum(axis=1)
        wanted = {j: 0.0 for j in range(n) if not policy.sinks <= j < policy.sinks + hashed}
        p = chances(q, centred, policy)
        wanted |= {policy.sinks + int(i): -math.log(p[i]) for i in np.flatnonzero(hits >= 2)}
        assert weights(lists, head) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_keys_are_sampled_as_likely_as_they_weigh() -> None:
    """Over 1,500 seeds, by binomial tests on every key of two heads."""
    made = cache(2, 30, "gaussian", g=1, d=6)
    counts = np.zeros((2, 30))
    for seed in range(1500):
        found = chosen_by(MagicPIG(planes=3, tables=6, sinks=0, recent=0, seed=seed), made)
        for head, line in enumerate(sets(found)):
            counts[head, list(line)] += 1
    keys = of_keys(made, 0) - of_keys(made, 0).mean(axis=0)
    p = np.stack([chances(q, keys, MagicPIG(planes=3, tables=6)) for q in made.q.numpy()])
    low, high = stats.binom.interval(1 - ALARM / 60, 1500, p)
    assert ((low <= counts) & (counts <= high)).all()


def test_numerator_and_denominator_are_unbiased() -> None:
    """Over 1,500 seeds, by z-tests on sums of weights and of weighted values."""
    made = cache(3, 60, "gaussian", g=1, group=1, d=6)
    mass = np.exp(scores(made, 0))
    rows = np.column_stack([mass, mass[:, None] * made.v[0].numpy()])
    sums = []
    for seed in range(1500):
        listed = weights(chosen_by(MagicPIG(planes=3, tables=8, sinks=2, recent=3, seed=seed), made), 0)
        sums.append(sum(math.exp(log) * rows[j] for j, log in listed.items()))
    spread = np.std(sums, axis=0, ddof=1) / len(sums) ** 0.5
    assert (abs(np.mean(sums, axis=0) - rows.sum(axis=0)) < stats.norm.isf(ALARM / 12) * spread).all()


@pytest.mark.parametrize(("planes", "tables"), [(1, 2), (10, 150), (15, 300), (4, 20)])
def test_chances_have_no_cancellation(planes: int, tables: int) -> None:
    angles = np.array([1e-6, 0.3, 1.0, 1.5, 2.0, 2.5, 2.8, 3.0, 3.1, 3.14, 3.1415])
    found = log_chance(torch.from_numpy(np.cos(angles)), planes, tables).numpy()
    c = (1 - np.arccos(np.cos(angles)) / np.pi) ** planes
    wanted = stats.binom.logsf(1, tables, c)
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-12)
    assert log_chance(torch.tensor([1.0], dtype=torch.float64), planes, tables) == 0
    assert torch.isfinite(log_chance(torch.tensor([-1.0], dtype=torch.float64), planes, tables)).all()


def test_the_first_and_last_are_listed_as_they_are() -> None:
    policy = MagicPIG(planes=15, tables=2, sinks=4, recent=10, refresh=20)
    made = cache(4, 200, "gaussian")
    steps = begun(policy, made.first(100))
    for end in range(101, 200):
        steps.append(*made.first(end)[1:3])
        lists = steps.choose(made.q, *made.first(end)[1:3])
        open_from = 90 + (end - 100) // 20 * 20
        for line in range(4):
            assert {0, 1, 2, 3, *range(open_from, end)} <= set(weights(lists, line))
            assert all(log == 0 for j, log in weights(lists, line).items() if j < 4 or j >= open_from)


def test_seeds_draw_anew_and_the_same_seed_the_same() -> None:
    made = cache(5, 300, "gaussian")
    first, again, other = (sets(chosen_by(MagicPIG(4, 20, seed=seed), made)) for seed in (0, 0, 1))
    assert first == again != other


def test_more_tables_sample_more_and_more_planes_less() -> None:
    made = cache(6, 400, "gaussian")
    sizes = [sum(map(len, sets(chosen_by(MagicPIG(*given), made)))) for given in ((8, 20), (8, 80), (5, 80), (2, 150))]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_bytes_are_of_hashes() -> None:
    assert MagicPIG().bytes_read(68, 128, 2) == 0
    assert MagicPIG(tables=150).bytes_read(1068, 128, 2) == 300 * 1000


@every
@pytest.mark.parametrize("kind", KINDS)
def test_it_serves(policy: MagicPIG, kind: str) -> None:
    assert_serves(policy, kind)


@every
def test_a_batch_is_as_its_sequences_alone(policy: MagicPIG) -> None:
    assert_folds(policy)


def test_a_query_of_zeros_is_at_right_angles_to_all() -> None:
    made = cache(7, 100, "gaussian")
    lists = chosen_by(BARE, Cache(torch.zeros_like(made.q), *made[1:]))
    p = stats.binom.sf(1, 5, 1 / 8)
    assert all(log == pytest.approx(-math.log(p), rel=1e-5) for log in weights(lists, 0).values())


WRONG = {
    "planes": (0, 16),
    "tables": (1, 2.0),
    "sinks": (-1,),
    "recent": (-1,),
    "refresh": (0,),
    "seed": (-1,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} must be"):
        MagicPIG(**{name: value})  # type: ignore[arg-type]

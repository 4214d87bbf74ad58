"""What is added to a selector's lists: samples whose sums are unbiased, means, and nothing that is listed already."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from attention import Dense, audit, prefill
from attention.chances import starts as of_blocks
from attention.key_lists import KeyLists, check, edges, ends, plain, row_blocks
from attention.list_tail import ListTail, starts
from attention.listed_reference import lines_of, listed
from attention.selector import ListMaker
from attention.selectors import MInference, PowerAttention, StreamingLLM, catalogue
from hsr.errors import ArgumentError
from tests.prompts import Prompt, prompts, some_lists
from tests.selectors import gaussian, lines, lists_of

WRAPPED = [
    ListTail(next(iter(selector.examples())), sampled, means)
    for selector in catalogue().values()
    for sampled, means in ((7, False), (0, True), (7, True))
]
every = pytest.mark.parametrize("policy", WRAPPED, ids=str)
ONCE = [policy for policy in WRAPPED if policy.sampled and policy.means]
NOTHING = StreamingLLM(sinks=0, window=1)


@dataclasses.dataclass(frozen=True)
class Given(ListMaker):
    """Lists that were made before."""

    made: KeyLists

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        return KeyLists(**{x: torch.from_numpy(y) for x, y in vars(self.made).items() if isinstance(y, np.ndarray)})


@every
@settings(max_examples=12)
@given(prompt=prompts())
def test_lists_stay_sound_whatever_the_prompt(policy: ListTail, prompt: Prompt) -> None:
    lists_of(policy, prompt)  # checks them


@settings(max_examples=150)
@given(
    prompt=prompts(), share=st.floats(0, 1), sampled=st.integers(0, 300), means=st.booleans(), seed=st.integers(0, 9)
)
def test_what_is_added_is_what_was_left(prompt: Prompt, share: float, sampled: int, means: bool, seed: int) -> None:
    """Line by line, beside lists of all three kinds whose arrays are longer than their offsets say."""
    made = some_lists(np.random.default_rng(seed), prompt.shape, share)
    policy = ListTail(Given(made), sampled, means or not sampled, seed)
    found = plain(lists_of(policy, prompt))
    _, m, n = prompt.shape
    for line in range(made.lines):
        tokens, blocks, pooled = lines_of(made, line)
        more, same, larger = lines_of(found, line)
        assert np.array_equal(more[: len(tokens)], tokens) and np.array_equal(same, blocks)
        old, new = (x.token_offsets[line] for x in (made, found))
        assert np.array_equal(found.log_weights[new : new + len(tokens)], made.log_weights[old : old + len(tokens)])
        listed_keys = set(tokens) | {128 * J + i for J in (*blocks, *pooled) for i in range(128)}
        rest = set(range(edges(m, n)[line % row_blocks(m)])) - listed_keys
        if policy.means:
            whole = {J for J in range(n // 128) if {128 * J, 128 * J + 64} <= rest and not set(tokens // 128) & {J}}
            assert set(larger) == set(pooled) | whole
            rest -= {128 * J + i for J in whole for i in range(128)}
        else:
            assert np.array_equal(larger, pooled)
        drawn, size = more[len(tokens) :], min(sampled, len(rest))
        assert len(drawn) == len(set(drawn)) == size and set(drawn) <= rest
        weights = found.log_weights[new + len(tokens) : found.token_offsets[line + 1]]
        assert np.allclose(weights, math.log(max(len(rest), 1) / max(size, 1)), atol=1e-6)


def test_every_remaining_key_has_the_same_chance() -> None:
    """1,500 seeds: counts of 250 keys are within 5 standard deviations of their mean; one such test in 7,000 fails."""
    prompt, draws = gaussian(0, 128, 384, g=1, group=1, d=2), 1500
    inner = StreamingLLM(sinks=6, window=1)
    counts = np.zeros(384)
    for seed in range(draws):
        found = plain(ListTail(inner, sampled=9, seed=seed).lists(*map(torch.from_numpy, prompt[:2]), 1.0))
        counts[found.tokens[6 : found.token_offsets[-1]]] += 1
    chance = 9 / 250
    assert counts[:6].sum() == counts[256:].sum() == 0 and counts.sum() == 9 * draws
    assert np.abs(counts[6:256] - draws * chance).max() < 5 * math.sqrt(draws * chance * (1 - chance))


@pytest.mark.parametrize("inner", [NOTHING, MInference(vertical=40, slash=100)], ids=str)
def test_sums_of_weights_and_of_weighted_values_are_unbiased(inner: ListMaker) -> None:
    """z-tests over 400 seeds of all sums at once, Bonferroni at a false alarm in a million; the seeds are fixed."""
    prompt = gaussian(3, 150, 900, g=1, group=1, sharp=1.0)
    q, k, v = prompt
    scores = prompt.scale * np.einsum("hmd,hNd->hmN", q, k)
    scores[:, np.arange(150)[:, None] + 750 < np.arange(900)] = -np.inf
    weights, what = np.exp(scores)[0, ::10], np.concatenate([np.ones((900, 1)), v[0]], axis=1)
    sums, runs = [], 400
    for seed in range(runs):
        found = plain(lists_of(ListTail(inner, sampled=24, seed=seed), prompt))
        shown = np.stack([factors(found, line, 150, 900) for line in range(2)])
        sums.append((weights * shown[np.arange(0, 150, 10) // 128]) @ what)
    off = np.mean(sums, axis=0) - weights @ what
    z = off / (np.std(sums, axis=0, ddof=1) / math.sqrt(runs))
    assert np.abs(z).max() < norm.isf(0.5e-6 / z.size)
    assert np.std(z) > 0.2  # the sums do vary


def factors(lists: KeyLists, line: int, m: int, n: int) -> np.ndarray:
    """What the weight of each key of a line is multiplied by: (n,)."""
    tokens, blocks, means = lines_of(lists, line)
    found = (np.arange(n) >= edges(m, n)[line]).astype(float)
    found[np.concatenate([128 * blocks[:, None] + np.arange(128)]).ravel()] = 1
    found[tokens] = np.exp(lists.log_weights[lists.token_offsets[line] : lists.token_offsets[line + 1]])
    assert not means.size
    return found


def test_errors_fall_on_a_diffuse_head() -> None:
    prompt = gaussian(4, 1024, 1024, sharp=0.3)
    v = prompt.v + np.linspace(0, 5, 1024)[:, None]  # so that what is far away matters
    prompt = prompt._replace(v=v, q=prompt.q - prompt.q.mean(axis=1, keepdims=True))
    exact = prefill(*prompt, policy=Dense())
    bare, *others = (
        prefill(*prompt, policy=policy)
        for policy in (PowerAttention(), *(ListTail(PowerAttention(), *x) for x in ((64, False), (0, True))))
    )
    wrong, *less = (np.linalg.norm(x.output - exact.output, axis=2).mean() for x in (bare, *others))
    assert max(less) < wrong / 3
    off, *nearer = (np.abs(x.lse - exact.lse).mean() for x in (bare, *others))
    assert max(nearer) < off / 3


@pytest.mark.parametrize("policy", ONCE, ids=str)
def test_prefill_attends_to_the_lists_and_knows_their_density(policy: ListTail) -> None:
    prompt = gaussian(5, 421, 900)
    result = prefill(*prompt, policy=policy)
    lists = plain(lists_of(policy, prompt))
    output, lse = listed(*prompt, lists, prompt.scale)
    assert np.allclose(result.output, output) and np.allclose(result.lse, lse)
    kinds = [
        sum(len(x) * size for x, size in zip(lines_of(lists, line), (1, 128, 1), strict=True)) for line in range(16)
    ]
    band = (ends(421, 900) - edges(421, 900)).sum()
    assert np.allclose(result.densities, (np.reshape(kinds, (4, 4)).sum(axis=1) + band) / ends(421, 900).sum())


@pytest.mark.parametrize("policy", ONCE, ids=str)
def test_an_audit_goes_on_from_it(policy: ListTail) -> None:
    prompt = gaussian(6, 200, 500)
    found = audit(*prompt, policy, rows=4, escalate=True, max_error=0.0)
    tried = [attempt.audited for attempt in (*found.earlier, found)]
    assert tried[0] == policy and tried[-1] == Dense()
    assert all(b.sampled in (a.sampled, 4 * a.sampled) and b.means for a, b in itertools.pairwise(tried[:-1]))
    assert tried[-2].tighter(500) is None and tried[-2].sampled == 7 * 4**3


@every
def test_nothing_is_read_back_and_nothing_leaves_the_device(policy: ListTail) -> None:
    q, k = torch.empty(4, 300, 16, device="meta"), torch.empty(2, 431, 16, device="meta")
    made = [x for x in vars(policy.lists(q, k, 0.25)).values() if isinstance(x, torch.Tensor)]
    assert made and all(x.device.type == "meta" for x in made)


def test_draws_are_those_of_their_seed_and_begin_like_other_draws() -> None:
    prompt = gaussian(7, 300, 700)
    one, same, other, far = (lines(ListTail(NOTHING, 5, seed=seed), prompt) for seed in (0, 0, 1, 1 << 32))
    assert one == same and one != other and one != far
    for seed in (0, 5, (1 << 63) - 1):
        found = starts(seed, 3, 4, torch.device("cpu")).numpy()
        assert np.array_equal(np.floor(found * 2**24), of_blocks(seed, 3, 4)) and (found % 2**-24 > 0).all()


def test_a_tail_looks_at_no_token() -> None:
    assert ListTail(NOTHING, 3).causal and not ListTail(MInference(), 3).causal
    prompt = gaussian(8, 300, 700)
    turned = prompt._replace(k=prompt.k[:, ::-1].copy())
    assert lines(ListTail(NOTHING, 9, means=True), prompt) == lines(ListTail(NOTHING, 9, means=True), turned)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampled": 0}, "sampled must be at least 1 unless means is True; got 0 and False"),
        ({"sampled": -1}, "sampled must be at least 0; got -1"),
        ({"means": 1}, "means must be True or False; got 1"),
        ({"seed": -1}, "seed must be in 0..9223372036854775807; got -1"),
        ({"selector": Dense()}, r"selector must make lists.*; got Dense\(\)"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ListTail(**({"selector": NOTHING, "sampled": 4} | given))  # type: ignore[arg-type]


def test_made_lists_are_checked_by_what_the_tests_use() -> None:
    """A key drawn twice, or drawn though it is listed, would be seen."""
    prompt = gaussian(9, 128, 384, g=1, group=1)
    found = plain(lists_of(ListTail(NOTHING, 5), prompt))
    broken = dataclasses.replace(
        found, tokens=np.where(np.arange(len(found.tokens)) == 1, found.tokens[0], found.tokens)
    )
    with pytest.raises(ArgumentError, match="tokens must name each key once"):
        check(broken, *prompt.shape)


def test_a_tail_of_a_tail_would_count_twice() -> None:
    with pytest.raises(ArgumentError, match="selector must leave keys out, which ListTail"):
        ListTail(ListTail(NOTHING, sampled=9), sampled=9)

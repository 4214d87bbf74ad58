"""Squeezed Attention against its paper, given the same clusters, in float64; prefixes that are saved and used again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from attention import DecodeSession
from attention.chosen_reference import chosen
from attention.clusters import plus_plus, unit
from attention.selectors.squeezed_attention import PrefixClusters, SqueezedAttention
from attention.squeezed_prefix import SqueezedPrefix, quantile
from hsr.errors import ArgumentError, StorageError
from tests.caches import KINDS, Cache, assert_folds, assert_serves, cache, chosen_by, lloyd_by_loops, of_keys, sets

ONE = PrefixClusters(window=30, iterations=10)
TWO = PrefixClusters(0.1, coarse=0.03, sparsity=0.8, coarse_sparsity=0.4, window=30, iterations=10)
every = pytest.mark.parametrize("how", [ONE, TWO, PrefixClusters(0.2, sparsity=0.5, window=7, iterations=3)], ids=str)


def queries(made: Cache, m: int) -> torch.Tensor:
    """Of the prompt's end, (H, m, d): around the query that decodes."""
    random = np.random.default_rng(m)
    return made.q[:, None] + torch.from_numpy(random.standard_normal((len(made.q), m, made.q.shape[1])))


def indexed(how: PrefixClusters, made: Cache, asked: torch.Tensor | None, batch: int = 1) -> SqueezedPrefix:
    found = how.prefix(made.k, asked, made.scale, batch)
    assert found is not None
    return found


def owners_of(prefix: SqueezedPrefix, g: int) -> list[np.ndarray]:
    """The cluster of each token at each level, the coarsest first."""
    found: list[np.ndarray] = []
    for level in reversed(prefix.levels):
        owners = level.owners[g].numpy()
        found.insert(0, owners[found[0]] if found else owners)
    return found


def log_s(made: Cache, head: int, q: np.ndarray, owners: list[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """ln S of every token's cluster at the last of the levels, among the tokens that are left."""
    keys = of_keys(made, head)
    mean = {c: made.scale * keys[: len(tokens)][owners[-1] == c].mean(axis=0) @ q for c in set(owners[-1])}
    sizes = {c: int((owners[-1] == c).sum()) for c in mean}
    alive = {c for c in mean if tokens[owners[-1] == c].all()}
    total = math.log(sum(sizes[c] * math.exp(mean[c]) for c in alive)) if alive else 0.0
    return np.array([mean[c] - total if c in alive else -np.inf for c in owners[-1]])


def thresholds(made: Cache, asked: np.ndarray, prefix: SqueezedPrefix, heads: range) -> list[float]:
    """T of each level: the quantile over heads, queries and tokens."""
    found: list[float] = []
    for depth, level in enumerate(prefix.levels):
        values = []
        for head in heads:
            owners = owners_of(prefix, head * len(made.k) // len(made.q))
            for q in asked[head]:
                left = passed(made, head, q, owners[:depth], found, prefix.clustered)
                values.append(log_s(made, head, q, owners[: depth + 1], left))
        ordered = np.sort(np.concatenate(values))
        found.append(ordered[math.ceil(level.sparsity * len(ordered) - 1e-9) - 1])
    return found


def passed(made: Cache, head: int, q: np.ndarray, owners: list[np.ndarray], limits: list[float], n: int) -> np.ndarray:
    """Tokens whose clusters pass every level."""
    left = np.ones(n, bool)
    for depth, limit in enumerate(limits[: len(owners)]):
        left &= log_s(made, head, q, owners[: depth + 1], left) > limit + 1e-9
    return left


@every
@pytest.mark.parametrize("kind", ["gaussian", "grouped", "offset"])
def test_it_is_the_paper(how: PrefixClusters, kind: str) -> None:
    n = 300
    made = cache(1, n + 20, kind)
    asked = queries(made, 40)
    prefix = indexed(how, made.first(n), asked)
    window = asked[:, -how.window :].numpy()
    limits = thresholds(made, window, prefix, range(4))
    for level, limit in zip(prefix.levels, limits, strict=True):
        assert torch.allclose(level.threshold, torch.tensor(limit, dtype=torch.float64).expand(2))  # type: ignore[arg-type]
    steps = SqueezedAttention(how).begin(made.k[:, :n], made.v[:, :n], asked, made.scale)
    steps.append(*made[1:3])
    for head, line in enumerate(sets(steps.choose(*made[:3]))):
        owners = owners_of(prefix, head // 2)
        shown = passed(made, head, made.q[head].numpy(), owners, limits, n - how.window)
        assert line == set(np.flatnonzero(shown)) | set(range(n - how.window, n + 20))


@every
def test_without_queries_a_step_sets_its_own_threshold(how: PrefixClusters) -> None:
    made = cache(2, 300)
    prefix = indexed(how, made, None)
    for head, line in enumerate(sets(chosen_by(SqueezedAttention(how), made))):
        alone = made._replace(q=made.q[head : head + 1], k=made.k[head // 2 : head // 2 + 1])
        limits = thresholds(
            alone, made.q[head : head + 1, None].numpy(), prefix.heads(head // 2, head // 2 + 1), range(1)
        )
        shown = passed(made, head, made.q[head].numpy(), owners_of(prefix, head // 2), limits, prefix.clustered)
        assert line == set(np.flatnonzero(shown)) | set(range(prefix.clustered, 300))
        assert shown.sum() <= (1 - how.sparsity) * prefix.clustered + 1e-9


def test_clusters_are_by_angle_and_means_of_the_keys_as_they_are() -> None:
    how = PrefixClusters(window=20, iterations=4)
    made = cache(3, 200, "offset")
    level = indexed(how, made, None).levels[0]
    points = unit(made.k[:, :180])
    start = plus_plus(points, 9, 0)
    for g in range(2):
        owners = lloyd_by_loops(points[g].numpy(), start[g].numpy(), 4, True)
        assert np.array_equal(level.owners[g].numpy(), owners)
        for c in set(owners):
            assert np.allclose(level.means[g, c], made.k[g, :180].numpy()[owners == c].mean(axis=0))


@every
@pytest.mark.parametrize("kind", KINDS)
def test_calibrating_queries_are_shown_no_more_than_the_rest_of_the_quantile(how: PrefixClusters, kind: str) -> None:
    made = cache(4, 250, kind)
    asked = queries(made, how.window)
    prefix = indexed(how, made, asked)
    shown = prefix.kept(asked, made.scale).double().mean()
    assert shown <= 1 - how.sparsity + 1e-9
    assert kind not in ("gaussian", "grouped") or shown >= 1 - how.sparsity - 0.2


def test_one_threshold_serves_all_heads_of_a_sequence_and_no_other() -> None:
    made = cache(5, 300, g=4)
    asked = queries(made, 30)
    together, apart = (indexed(ONE, made, asked, batch).levels[0].threshold for batch in (1, 2))
    assert together is not None and len(set(together.tolist())) == 1
    assert apart is not None and apart[0] == apart[1] != apart[2] == apart[3]
    half = made._replace(q=made.q[:4], k=made.k[:2], v=made.v[:2])
    assert torch.allclose(apart[:2], indexed(ONE, half, asked[:4]).levels[0].threshold)  # type: ignore[arg-type]


def test_layers_are_calibrated_together_and_taken_apart() -> None:
    """Two layers of two heads, folded into the heads: one threshold, each layer's own clusters."""
    made = cache(6, 300, g=4)
    both = indexed(TWO, made, queries(made, 30))
    own = both.heads(2, 4)
    layer = made._replace(q=made.q[4:], k=made.k[2:], v=made.v[2:])
    assert own.levels[0].threshold is not None and own.levels[0].threshold[0] == both.levels[0].threshold[0]  # type: ignore[index]
    assert sets(chosen_by(SqueezedAttention(own), layer)) == sets(chosen_by(SqueezedAttention(both), made))[4:]
    for given in ((4, 5), (2, 2), (-1, 2), (0, 5)):
        with pytest.raises(ArgumentError, match="must be"):
            both.heads(*given)


@every
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_saved_prefix_serves_as_it_did(how: PrefixClusters, calibrated: bool, tmp_path: Path) -> None:
    made = cache(7, 400)
    prefix = indexed(how, made.first(300), queries(made, 30) if calibrated else None)
    path = tmp_path / "prefix.npz"
    prefix.save(path)
    prefix.save(path)
    loaded = SqueezedPrefix.load(path)
    assert [found.name for found in tmp_path.iterdir()] == ["prefix.npz"]
    assert repr(loaded) == repr(prefix) and "n=300" in repr(loaded)
    for level, other in zip(prefix.levels, loaded.levels, strict=True):
        assert all(torch.equal(getattr(level, x), getattr(other, x)) for x in ("owners", "sizes", "means"))
        assert level.sparsity == other.sparsity and (level.threshold is None) == (not calibrated)
    wanted = sets(chosen_by(SqueezedAttention(prefix), made, (320,)))
    assert wanted == sets(chosen_by(SqueezedAttention(loaded), made, (300, 350)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        chosen_by(SqueezedAttention(loaded), made.to(dtype))


def test_sequences_of_a_batch_share_a_prefix() -> None:
    """What follows it is their own, as are their queries."""
    prefix = indexed(ONE, cache(8, 300), queries(cache(8, 300), 30))
    one, other = cache(8, 350), cache(8, 350)
    other.k[:, 300:] *= -1
    other = other._replace(q=-one.q)
    both = Cache(*(torch.cat(pair) for pair in zip(one[:3], other[:3], strict=True)), one.scale)
    one.k[:, :300], other.k[:, :300], both.k[:, :300] = (
        cache(8, 300).k,
        cache(8, 300).k,
        cache(8, 300).k.repeat(2, 1, 1),
    )
    found = [sets(chosen_by(SqueezedAttention(prefix), made)) for made in (one, other, both)]
    assert found[0] + found[1] == found[2] and found[0] != found[1]


def test_sessions_take_a_saved_prefix(tmp_path: Path) -> None:
    """Of one sequence and of two, whose other tokens differ; beside attention to the lists by definition."""
    made, more = cache(16, 330).to(torch.float32), cache(17, 40).to(torch.float32)
    indexed(TWO, made.first(300), queries(made, 30).float()).save(tmp_path / "prefix.npz")
    policy = SqueezedAttention(SqueezedPrefix.load(tmp_path / "prefix.npz"))
    other = made._replace(k=torch.cat([made.k[:, :300], more.k[:, :30]], 1))
    for caches in ([made], [made, other]):
        q, k, v = (torch.stack([c[i] for c in caches]) for i in range(3))
        session = DecodeSession(k[:, :, :310], v[:, :, :310], policy=policy, scale=made.scale)
        session.append(k[:, :, 310:], v[:, :, 310:])
        found = session.attend(q[:, :, None])
        for i, one in enumerate(caches):
            lists = chosen_by(policy, one)
            assert int(lists.counts.max()) < 330
            assert np.allclose(found.output[i, :, 0], chosen(*one[:3], lists, one.scale)[0], atol=1e-5)
            assert np.array_equal(found.counters.reported[i, :, 0], lists.counts)


def test_another_cache_than_the_prefix_is_refused() -> None:
    made = cache(9, 300)
    prefix = indexed(ONE, made, None)
    wrong = {
        "keys of prefix": cache(10, 300),
        "300 tokens of prefix": made.first(299),
        "heads of width 16": cache(9, 300, d=8),
        "multiple of 2 heads": made._replace(k=made.k[:1], v=made.v[:1]),
    }
    for message, other in wrong.items():
        with pytest.raises(ArgumentError, match=f"^k must.*{message}"):
            SqueezedAttention(prefix).begin(*other[1:3], None, 0.25)
    changed = made.k.clone()
    changed[:, 100:120] = changed[:, 120:140]
    with pytest.raises(ArgumentError, match=r"^k must begin with the keys of prefix; got some whose mean is \d"):
        SqueezedAttention(prefix).begin(changed, made.v, None, 0.25)


ALTERED: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "format": lambda x: x.update(format=np.array(2)),
    "no array 'means1'": lambda x: x.pop("means1"),
    "owners0 in": lambda x: x["owners0"].__setitem__((0, 0), 99),
    "owners1 in": lambda x: x["owners1"].__setitem__((0, 0), -1),
    "owners1 of shape": lambda x: x.update(owners1=x["owners1"].ravel()),
    "owners0 of shape": lambda x: x.update(owners0=x["owners0"][:, :-1]),
    "means0 of shape": lambda x: x.update(means0=x["means0"][:1]),
    "no NaN in means1": lambda x: x["means1"].__setitem__((0, 0, 0), np.nan),
    "threshold0 of 0 or 2": lambda x: x.update(threshold0=x["threshold0"][:1]),
    "sparsity1 in": lambda x: x.update(sparsity1=np.array(1.0)),
    "levels of at most 100 tokens": lambda x: x.update(n=np.array(100)),
    "levels of at most 300 tokens": lambda x: x.update(levels=np.array(0)),
    "kind 'i'": lambda x: x.update(n=np.array(3.5)),
}


@pytest.mark.parametrize("message", ALTERED)
def test_a_file_that_is_no_prefix_is_refused(message: str, tmp_path: Path) -> None:
    made, path = cache(11, 300), tmp_path / "prefix.npz"
    indexed(TWO, made, queries(made, 30)).save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    ALTERED[message](arrays)
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=message):
        SqueezedPrefix.load(path)


def test_a_file_with_any_byte_altered_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    made, path = cache(12, 60, d=4), tmp_path / "prefix.npz"
    prefix = indexed(ONE, made, queries(made, 30))
    prefix.save(path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for place in random.integers(0, len(whole), 150).tolist():
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        try:
            found = SqueezedPrefix.load(path)
        except StorageError:
            refused += 1
        else:
            assert torch.equal(found.levels[0].means, prefix.levels[0].means) and found.n == prefix.n
    assert refused > 75
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StorageError, match="not a saved prefix, or truncated or altered"):
            SqueezedPrefix.load(path)
    with pytest.raises(OSError, match="No such file"):
        SqueezedPrefix.load(tmp_path / "none.npz")


def test_the_quantile_leaves_no_more_above_than_its_rest() -> None:
    shares = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    weights = torch.tensor([[1, 5, 2, 2]])
    found = {share: float(quantile(shares, weights, share)) for share in (0.0, 0.5, 0.51, 0.7, 0.8, 0.81, 0.99)}
    assert found == {0.0: -math.inf, 0.5: 1.0, 0.51: 2.0, 0.7: 2.0, 0.8: 3.0, 0.81: 4.0, 0.99: 4.0}


def test_sparsity_0_keeps_everything() -> None:
    made = cache(13, 300)
    for how in (PrefixClusters(sparsity=0.0, coarse_sparsity=0.0), PrefixClusters(0.1, 0.1, 0.0, 0.0)):
        for asked in (None, queries(made, 10)):
            steps = SqueezedAttention(how).begin(*made[1:3], asked, made.scale)
            assert sets(steps.choose(*made[:3])) == [set(range(300))] * 4


def test_a_prefix_no_longer_than_its_window_has_no_index() -> None:
    for n in (1, 29, 30):
        assert ONE.prefix(cache(14, n).k, None, 0.25) is None
        assert sets(chosen_by(SqueezedAttention(ONE), cache(14, n + 5), (n,))) == [set(range(n + 5))] * 4
    assert ONE.prefix(cache(14, 31).k, None, 0.25) is not None


def test_bytes_are_of_means() -> None:
    assert SqueezedAttention(ONE).bytes_read(1030, 128, 2) == pytest.approx(50 * (128 * 4 + 4))
    assert SqueezedAttention(TWO).bytes_read(1030, 128, 2) == pytest.approx(130 * (128 * 4 + 4))
    prefix = indexed(TWO, cache(15, 230), None)
    assert SqueezedAttention(prefix).bytes_read(10**6, 16, 2) == (20 + 6) * (16 * 4 + 4)


@pytest.mark.parametrize("policy", SqueezedAttention.examples(), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_serves(policy: SqueezedAttention, kind: str) -> None:
    assert_serves(policy, kind)


@pytest.mark.parametrize("policy", SqueezedAttention.examples(), ids=str)
def test_a_batch_is_as_its_sequences_alone(policy: SqueezedAttention) -> None:
    assert_folds(policy)


WRONG = {
    "clusters": (0, 1.1),
    "coarse": (0, 0.06),
    "sparsity": (-0.1, 1),
    "coarse_sparsity": (-0.1, 0.71),
    "window": (-1,),
    "iterations": (-1, 1.5),
    "seed": (-1,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} must be"):
        PrefixClusters(**{name: value})  # type: ignore[arg-type]


def test_an_index_is_a_prefix_or_how_to_make_one() -> None:
    with pytest.raises(ArgumentError, match="index must be PrefixClusters or SqueezedPrefix; got int"):
        SqueezedAttention(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 10, 21, 40])
def test_no_window_still_lists_something(n: int) -> None:
    made = cache(3, n)
    lists = SqueezedAttention(PrefixClusters(window=0)).begin(made.k, made.v, None, made.scale).choose(*made[:3])
    assert (lists.counts > 0).all()

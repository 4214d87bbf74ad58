"""What is said of keys is true of them; files that hold none are refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.cli import explain, key_facts, key_file, key_search
from hsr.errors import ArgumentError
from tests.cli.test_app import invoked

HUGE = io.BytesIO()
np.lib.format.write_array_header_1_0(HUGE, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50, 64)})
HUGE = HUGE.getvalue()  # of an array that no machine holds
ASKED: dict[str, str | None] = dict.fromkeys(key_file.NAMES)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times mean nothing here."""
    monkeypatch.setattr(key_search, "REPEATS", 1)
    monkeypatch.setattr(key_search, "ROUND", 0.0)
    monkeypatch.setattr(key_search, "TIMED", 2)


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_everything_is_said_of_keys_with_queries(tmp_path: Path) -> None:
    keys = some(2, 300, 8)
    keys[0, 3:6] = keys[0, 2]
    keys[1, 7] = 0
    file = saved(tmp_path / "cache.npz", k=keys, q=some(4, 6, 8, seed=1), v=keys)
    folder = tmp_path / "new" / "report"
    status, out, _ = invoked("explain", str(file), "--causal", "--save", str(folder), "--head", "1")
    assert status == 0
    for part in (
        "keys: array k, float32 (2, 300, 8)",
        "queries are the last positions",
        "6 queries of each of 4 query heads",
        "What methods cost",
        "Head 1, one query a call",
        "sketch",
        "box of 16, kd",
        "it needs keys of width 2",
        "suggested: method brute",
        "300 keys are at most 1024",
        "is the fastest method",
    ):
        assert part in out, part
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    shapes = [row for row in rows if len(row) == 11]
    assert [row[9:] for row in shapes] == 2 * [["3", "0"], ["0", "1"]], "duplicates and zeros of keys, and of values"
    assert shapes[1][1] == "0", "the least norm"
    for name in ("spectrum", "mass", "pruning"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.partition("data:image")[0]
    assert "The keys of cache.npz" in page
    assert "<td>int8 codes</td>" in page


def test_queries_are_made_where_none_are_given_and_degenerate_keys_are_served(tmp_path: Path) -> None:
    keys = np.zeros((40, 2), np.float64)
    file = saved(tmp_path / "<b>&.npz", **{"<script>&": keys})
    status, out, _ = invoked("explain", str(file), "--save", str(tmp_path))
    assert status == 0
    page = (tmp_path / "index.html").read_text()
    assert page.count("The keys of &lt;b&gt;&amp;.npz") == 2 and "<b>" not in page
    assert "array &lt;script&gt;&amp;, float64" in page and "<script>" not in page
    assert "self-made, keys drawn at random less their mean (seed 0)" in out
    assert "layers" in out
    line = next(line for line in out.splitlines() if line.startswith("│ 0 "))
    assert [cell.strip() for cell in line.split("│")[1:-1]][9:] == ["39", "40"], "duplicates and zeros"


def test_all_threads_are_taken_before_anything_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    built = key_search.built
    monkeypatch.setattr(explain, "use_all_threads", lambda: calls.append("threads"))
    monkeypatch.setattr(key_search, "built", lambda *call: calls.append("built") or built(*call))
    assert invoked("explain", str(saved(tmp_path / "a.npz", k=some(40, 2))))[0] == 0
    assert calls == ["threads", "built"]


def test_brackets_are_shown() -> None:
    block = explain.Block("a [title]", ("a [head]",), [["a [cell]"]], "a [caption]")
    console = Console(file=io.StringIO(), record=True)
    console.print(explain.shown(block))
    shown = console.export_text()
    assert all(f"a [{part}]" in shown for part in ("title", "head", "cell", "caption"))


def test_shape_is_what_numpy_finds() -> None:
    keys = some(500, 6) * np.array([5, 3, 1, 1, 0.1, 0], np.float32) + np.float32(2)
    found = key_facts.shape(keys)
    wanted = np.linalg.eigvalsh(np.cov(keys.astype(np.float64), rowvar=False))[::-1]
    np.testing.assert_allclose(found.variances, wanted / wanted.sum(), atol=1e-9)
    assert found.effective == pytest.approx(wanted.sum() ** 2 / (wanted**2).sum())
    assert found.axes(0.9) == 1 + np.flatnonzero(wanted.cumsum() / wanted.sum() >= 0.9)[0]
    norms = np.linalg.norm(keys, axis=1)
    assert found.norms == pytest.approx((norms.min(), np.median(norms), norms.max()))
    assert found.offset == pytest.approx(np.linalg.norm(keys.mean(axis=0)) / np.sqrt((norms**2).mean()), rel=1e-5)


def test_concentration_is_that_of_the_visible_keys() -> None:
    keys, queries = some(50, 4), some(3, 4, seed=2)
    limits = np.array([1, 20, 50])
    found = key_facts.concentration(queries, keys, limits, 0.5)
    assert found.keys[0].tolist() == [1, 1, 1]
    for row, (query, limit) in enumerate(zip(queries, limits, strict=True)):
        weights = np.exp(0.5 * keys[:limit].astype(np.float64) @ query)
        weights /= weights.sum()
        best = np.sort(weights)[::-1].cumsum()
        assert found.keys[row].tolist() == [int((best < share).sum()) + 1 for share in key_facts.MASSES]
        assert found.perplexity[row] == pytest.approx(np.exp(-(weights * np.log(weights)).sum()))
    assert found.curve[-1] == pytest.approx(1)
    assert (np.diff(found.curve) >= 0).all()


def test_parts_and_positions_of_kept_heads_are_taken(tmp_path: Path) -> None:
    layers = some(3, 2, 30, 4)
    file = saved(tmp_path / "heads.npz", keys=layers, queries=some(3, 2, 2, 4), positions=np.array([4, 29]))
    found = key_file.read(file, ASKED, 1, causal=False)
    np.testing.assert_array_equal(found.keys, layers[1])
    assert found.limits.tolist() == [5, 30]
    with pytest.raises(ArgumentError, match="--layer must be below 3"):
        key_file.read(file, ASKED, 3, causal=False)


@pytest.mark.parametrize(
    ("arrays", "arguments", "reason"),
    [
        ({}, [], "FILE must hold keys; name them by --keys, it holds nothing"),
        ({"a": some(9, 2), "b": some(9, 2)}, [], "it holds a float32 (9, 2), b float32 (9, 2)"),
        (
            {"k": some(9, 2)},
            ["--keys", "K"],
            "--keys must name an array of the file; got 'K', it holds k float32 (9, 2)",
        ),
        ({"k": np.full((9, 2), np.nan)}, [], "k must be finite; got nan at (0, 0)"),
        ({"k": np.arange(9)[:, None]}, [], "k must have dtype float64"),
        ({"k": some(9)}, [], "k must have 2 axes or 3 axes; got shape (9,)"),
        ({"k": some(1, 4)}, [], "at least two keys"),
        ({"k": some(9, 2), "q": some(3, 4)}, [], "queries must be (h, m, 2) to match keys; got (1, 3, 4)"),
        ({"k": some(2, 9, 2), "q": some(3, 4, 2)}, [], "queries must have a positive multiple of 2 heads"),
        ({"k": some(9, 2), "v": some(8, 2)}, [], "values must be (1, 9, 'dv') to match keys"),
        ({"k": some(9, 2), "q": some(10, 2)}, ["--causal"], "at most as many as keys where they are causal; got 10"),
        ({"k": some(9, 2)}, ["--layer", "0"], "--layer needs arrays with four axes; got 0 where keys: array k"),
        ({"k": some(9, 2)}, ["--head", "1"], "--head must be below 1"),
        ({"k": np.array([[None, 1]])}, [], "must be an npz file of plain arrays"),
        ({"k": np.full((9, 2), 1e200)}, [], "finite products; theirs overflow"),
        ({"k": some(9, 2), "v": some(9, 0)}, [], "values must be (1, 9, 'dv') to match keys, dv at least 1"),
        ({"k": some(9, 2)}, ["--causal"], "--causal needs queries; got none"),
        ({"k": some(9, 2)}, ["--scale", "nan"], "scale must be in "),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], arguments: list[str], reason: str
) -> None:
    status, out, err = invoked("explain", str(saved(tmp_path / "a.npz", **arrays)), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("hsr explain: ")
    assert reason in err
    assert err.count("\n") == 1


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "there is none at" in invoked("explain", str(tmp_path / "none.npz"))[2]
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    assert "as numpy.savez writes it" in invoked("explain", str(text))[2]
    archive = tmp_path / "archive.npz"
    for name, content in (("k.txt", b"hello"), ("k.npy", b"hello"), ("k.npy", HUGE)):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, content)
        status, out, err = invoked("explain", str(archive))
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert "FILE must be an npz file of plain arrays" in err
    half = tmp_path / "half.npz"
    half.write_bytes(saved(tmp_path / "a.npz", k=some(200, 8)).read_bytes()[:900])
    assert invoked("explain", str(half))[0] == 2


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(np.float32, 1e-40), (np.float32, 1e30), *((np.float64, size) for size in (1e-300, 1e-40, 1e30, 1e140))],
)
def test_keys_of_any_finite_size_are_described(size: float, dtype: Any, tmp_path: Path) -> None:
    """Where products leave float32, in which the baselines are, keys and queries are scaled alike."""
    keys = (some(60, 8).astype(np.float64) * size).astype(dtype)
    status, out, err = invoked("explain", str(saved(tmp_path / "a.npz", k=keys)))
    assert (status, err) == (0, "")
    assert "for the costs, keys are scaled by 2^" in out and "nan" not in out


def test_scaling_is_exact_and_only_where_it_must_be() -> None:
    for dtype, sizes in ((np.float16, (6e-8, 6e4)), (np.float32, (1e-9, 1e9)), (np.float64, (1e-9, 1e9))):
        for size in sizes:
            keys = np.array([[size, -size / 2]], dtype)
            assert key_search.scaled(keys) == (keys, 0)
    keys = np.array([[3.0, -1.0], [0.0, 2.0]])
    for power in (-900, -130, 60, 900):
        found, by = key_search.scaled(np.ldexp(keys, power))
        assert np.array_equal(found, np.ldexp(keys, -2)) and by == -power - 2
    assert key_search.scaled(np.zeros((2, 2)))[1] == 0


def test_positions_that_do_not_fit_are_told(tmp_path: Path) -> None:
    for positions in (np.array([1.0, 5.0]), np.arange(3)):
        file = saved(tmp_path / "a.npz", k=some(30, 4), q=some(2, 4), positions=positions)
        said = key_file.read(file, ASKED, None, causal=False).said
        assert said[-1] == (
            f"every query sees every key: the array positions, {positions.dtype} {positions.shape}, is not one whole "
            "number for each of 2 queries"
        )


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "described", lambda *call: pytest.fail("the work was begun"))
    file = saved(tmp_path / "a.npz", k=some(30, 4))
    for folder in (file, file / "below"):
        status, out, err = invoked("explain", str(file), "--save", str(folder))
        assert (status, out) == (2, "") and err.startswith("hsr explain: --save must name a folder")

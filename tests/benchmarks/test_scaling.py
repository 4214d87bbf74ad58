"""The growing cases: their rows, their gates, and the figures drawn from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attention import ReLUPower, Softmax
from attention.reference import dense
from benchmarks import decoding, plots, prompts, real_keys, run, scaling_case, searches, tree_data_case
from benchmarks.dense_attention import attended
from benchmarks.gate import Answer, WrongAnswer, require_rows
from benchmarks.key_laws import LAWS, gaussian
from benchmarks.ledger import EMPTY, RULES
from benchmarks.measure import each
from benchmarks.searches import problem, serving
from hsr import methods

TINY = scaling_case.QUICK._replace(sizes=(256, 512), widths=(2, 3), lengths=(16, 32), tokens=64)


def fake_pool(tokens: int, seed: int) -> real_keys.Pool:
    rng = np.random.default_rng(seed)
    return real_keys.Pool(gaussian(rng, 50, 3), gaussian(rng, 300, 3))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_case, "QUICK", TINY)
    monkeypatch.setattr(tree_data_case, "QUICK_SIZE", 300)
    monkeypatch.setattr(real_keys, "missing", lambda _: None)
    monkeypatch.setattr(real_keys, "pool", fake_pool)


def measured(case: str, folder: Path) -> dict:
    file = folder / f"{case}.json"
    assert run.main([case, "--quick", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def drawn(case: str, folder: Path) -> set[str]:
    assert plots.main([str(folder / f"{case}.json")]) == 0
    found = list(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    return {path.name for path in found}


@pytest.mark.usefixtures("tiny")
def test_quick_scaling_has_a_row_for_everything_and_a_fit_for_every_growing_series(tmp_path: Path) -> None:
    found = measured("scaling", tmp_path)
    rows = found["rows"]
    assert all(list(row) == list(EMPTY) for row in rows)
    ours = {d: set(serving(d)) for d in TINY.widths}
    seen = {(row["data"], row["d"], row["n"], row["rule"], row["method"]) for row in rows if row["kind"] == "query"}
    sizes = {"gaussian": TINY.sizes, "smollm2": TINY.sizes[:1]}  # the pool has 300 keys
    assert seen == {
        (data, d, n, rule, method)
        for data in sizes
        for d in TINY.widths
        for n in sizes[data]
        for rule in RULES
        for method in ours[d] | {"numpy"}
    }
    ends = {(row["kind"], row["method"], row["weight"]) for row in rows if row["kind"] in ("decode", "prefill")}
    contenders = ours[2] - {"brute"} | {"dense"}
    assert ends == {(k, m, w) for k in ("decode", "prefill") for m in contenders for w in ("relu", "softmax")}
    fits = [row for row in rows if row["kind"] == "fit"]
    assert {row["data"] for row in fits} == {"gaussian"}, "one size is no growth"
    assert len(fits) == 2 * (sum(2 * (len(ours[d]) + 1) for d in TINY.widths) + 4 * len(contenders))
    linear = [row for row in fits if (row["method"], row["quantity"]) == ("brute", "work")]
    np.testing.assert_allclose([[row["exponent"], row["low"], row["high"]] for row in linear], 1.0)
    for row in rows:
        if row["kind"] in ("query", "decode"):
            assert row["ms"] > 0
            assert row["reported"] == pytest.approx(row["n"] if row["method"] == "dense" else row["k"], abs=0.5)
    assert any("smollm2: n ends at 256" in note for note in found["notes"])
    assert {f"scaling-{name}.png" for name in ("work-gaussian", "exponents", "ends", "end-exponents")} <= drawn(
        "scaling", tmp_path
    )


@pytest.mark.usefixtures("tiny")
def test_scaling_says_that_it_runs_without_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(real_keys, "missing", lambda program: f"{program}: not installed")
    found = measured("scaling", tmp_path)
    assert "the keys of SmolLM2 are left out: not installed" in found["notes"]
    assert {row["data"] for row in found["rows"]} == {"gaussian"}


def test_sizes_beyond_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(scaling_case, "MOST", 600)
    monkeypatch.setattr(scaling_case, "_one_size", lambda *_: iter(()))
    draw = lambda n: (np.zeros((n, 2)), np.zeros((1, 2)))  # noqa: E731
    list(scaling_case._grown(scaling_case.Ledger(), "gaussian", 2, draw, TINY, notes.append))
    assert len(notes) == 1
    assert notes[0].startswith("gaussian, d = 2: n ends at 256")


@pytest.mark.usefixtures("tiny")
def test_quick_tree_data_has_every_distribution(tmp_path: Path) -> None:
    rows = measured("tree-data", tmp_path)["rows"]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert {row["data"] for row in rows} == set(LAWS)
    plane = {row["method"] for row in rows if row["d"] == 2}
    assert plane == set(methods("build")) & set(tree_data_case.COMPARED) | {"numpy"}
    for row in rows:
        assert row["work_share"] == pytest.approx((row["visited"] + row["scanned"]) / row["n"])
        assert row["reported"] == pytest.approx(row["k"], abs=0.5)
    assert drawn("tree-data", tmp_path) == {"tree-data-work.png"}


def refuses(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    file = folder / "x.json"
    assert run.main([case, "--quick", "--json", str(file)]) == 1
    assert not file.exists()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("case", ["scaling", "tree-data"])
def test_a_lost_key_is_never_timed(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = searches.searcher

    def losing(index: object) -> searches.Contender:
        contender = right(index)

        def read(report: object) -> searches.Outcome:
            outcome = contender.read(report)
            offsets, indices, scores = outcome.answer
            return outcome._replace(answer=Answer(offsets - [0, 1], indices[:-1], scores[:-1]))

        return contender._replace(read=read)

    monkeypatch.setattr(scaling_case, "searcher", losing)
    monkeypatch.setattr(tree_data_case, "searcher", losing)
    monkeypatch.setattr(searches, "timed", never)
    assert refuses(case, tmp_path, capsys).startswith("nothing was timed: ")


def never(*_: object) -> None:
    raise AssertionError("the clock started before the gate")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("module", "name"), [(decoding, "decode"), (prompts, "prefill")])
def test_a_wrong_output_stops_the_run(
    module: object, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(module, name)

    def off(*arguments: object, **options: object) -> object:
        result = right(*arguments, **options)
        result.output[0, -1, 0] += 1e-3
        return result

    monkeypatch.setattr(module, name, off)
    assert "outputs wrong" in refuses("scaling", tmp_path, capsys)


def test_a_nan_is_a_wrong_output() -> None:
    wanted = np.zeros((3, 2))
    require_rows("x", wanted + 1e-7, wanted, 1e-6)
    with pytest.raises(WrongAnswer, match="x got 1 of 3 outputs wrong, row 1"):
        require_rows("x", np.array([[0, 0], [0, np.nan], [0, 0]]), wanted, 1e-6)


@pytest.mark.parametrize("weight", [Softmax(), ReLUPower(1, 0.3), ReLUPower(3, -0.1)])
@pytest.mark.parametrize(("m", "n"), [(1, 700), (600, 600), (300, 700)])
def test_dense_attention_is_the_reference(weight: Softmax | ReLUPower, m: int, n: int) -> None:
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((rows, 4)) for rows in (m, n, n))
    wanted, _ = dense(q[None], k[None], v[None], weight, 0.5, causal=True)
    np.testing.assert_allclose(attended(q, k, v, weight), wanted[0], atol=1e-12)


def test_ranks_are_exact() -> None:
    rng = np.random.default_rng(6)
    given = problem(gaussian(rng, 500, 3), gaussian(rng, 4, 3))
    assert ((given.scores >= given.at_rank(37)[:, None]).sum(axis=1) == 37).all()


def test_each_piece_keeps_its_fastest_time_and_rounds_end_with_the_budget() -> None:
    calls: list[int] = []
    assert (each(calls.append, 3, rounds=2, budget=60.0, pause=0.0) > 0).all()
    assert calls == [0, 0, 1, 2, 0, 1, 2]
    each(calls.append, 3, rounds=9, budget=0.0, pause=0.0)
    assert len(calls) == 7 + 4


def test_the_laws_are_what_they_say() -> None:
    made = {name: law(np.random.default_rng(7), 4000, 3) for name, law in LAWS.items()}
    assert all(keys.shape == (4000, 3) and keys.dtype == np.float32 for keys in made.values())
    np.testing.assert_allclose(np.linalg.norm(made["sphere"], axis=1), 1, rtol=1e-5)
    assert np.abs(made["cube"]).max() <= 1
    np.testing.assert_allclose(made["moment curve"].std(axis=0), 1, rtol=1e-3)


def test_projection_keeps_the_leading_axes() -> None:
    rng = np.random.default_rng(8)
    keys = gaussian(rng, 2000, 3) * np.float32([1, 9, 3])
    found, queries = real_keys.Pool(gaussian(rng, 40, 3), keys).projected(2, 5)(1500)
    assert (found.shape, queries.shape) == ((1500, 2), (5, 2))
    np.testing.assert_allclose(found.std(axis=0), [9, 3], rtol=0.1)


def test_plots_refuse_another_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text('{"case": "index"}')
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path / "x.json")])
    assert "got case 'index'" in capsys.readouterr().err

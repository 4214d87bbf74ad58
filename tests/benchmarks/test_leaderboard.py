"""Case ``leaderboard`` on made-up heads: complete rows, a gate that shuts, masks that are what was attended to."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the case measures torch tensors")
pytest.importorskip("transformers", reason="the case reads a model")

from attention import BlockSampled, Certified, DecodeSession, Dense, Sampled, TopR, prefill, selectors  # noqa: E402
from attention.head_clusters import HeadClusters  # noqa: E402
from attention.selectors import Quest, StreamingLLM  # noqa: E402
from benchmarks import leaderboard_case as case  # noqa: E402
from benchmarks import (  # noqa: E402
    leaderboard_decode,
    leaderboard_figures,
    leaderboard_prefill,
    leaderboard_roster,
    leaderboard_table,
    plots,
    real_keys,
    run,
    smollm,
)
from benchmarks.gate import WrongAnswer  # noqa: E402
from benchmarks.leaderboard_roster import Entry  # noqa: E402
from benchmarks.real_keys import Prompt  # noqa: E402
from benchmarks.watched import watched  # noqa: E402

H, G, N, D = 4, 2, 1024, 16
ENTRIES = {
    "decode": [Entry(Dense(), False), Entry(Quest(64), False), Entry(Sampled(budget=40, bytes_per_key=16), True)],
    "prefill": [Entry(Dense(), False), Entry(StreamingLLM(window=64), False), Entry(BlockSampled(density=0.5), True)],
}


def prompt(seed: int = 0) -> Prompt:
    """Queries that turn slowly, keys of which some matter to all rows."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(H, N, D, generator=random)
    q += 2 * torch.randn(H, N // 64, D, generator=random).repeat_interleave(64, 1)
    k, v = (torch.randn(G, N, D, generator=random) for _ in range(2))
    k[:, ::37] += q[::2].mean(1, keepdim=True)
    return Prompt(q, k, v + 0.5)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "missing", lambda: None)
    monkeypatch.setattr(smollm, "layer_count", lambda: 7)
    monkeypatch.setattr(real_keys, "prompts", lambda tokens, chosen, device, first=0: [prompt(i) for i in chosen])
    for part, entries in ENTRIES.items():
        monkeypatch.setattr(leaderboard_roster, part, lambda *_, entries=entries: entries)


def test_every_entry_has_a_row_a_point_and_a_line(model: None, tmp_path: Path) -> None:
    file = tmp_path / "leaderboard.json"
    assert run.main(["leaderboard", "--quick", "--json", str(file)]) == 0
    rows = run.json.loads(file.read_text())["rows"]
    assert [(row["part"], row["method"]) for row in rows] == [
        (part, entry.method) for part, entries in ENTRIES.items() for entry in entries
    ]
    assert {tuple(row) for row in rows} == {tuple(case.EMPTY)}
    for part, cost in (("decode", "kilobytes"), ("prefill", "share")):
        dense, rough, ours = (row for row in rows if row["part"] == part)
        assert dense["rel_err"] < 1e-5 < ours["rel_err"] < rough["rel_err"]
        assert dense["kept_mass"] == pytest.approx(1, abs=1e-5)
        assert 0 < rough["kept_mass"] < 1
        assert dense["share"] == pytest.approx(1)
        assert 0 < rough[cost] < dense[cost]
        for row in (dense, rough, ours):
            assert row["rel_err"] <= row["audit"] or row["rel_err_p90"] > 1  # audits cut errors off at 1
            assert row["ms"] > 0
    assert [row["looks_ahead"] for row in rows] == [False] * 5 + [True]
    assert plots.main([str(file)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["leaderboard-decode.png", "leaderboard-prefill.png"]
    leaderboard_table.main([str(file)])
    text = file.with_suffix(".md").read_text()
    assert "| **Sampled** | `budget=40 bytes_per_key=16` |" in text
    assert text.count("\n| ") == 2 * 2 + len(rows)


def test_dense_attention_that_is_off_shuts_the_gate() -> None:
    def off(policy: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(errors=np.full(3, 2 * case.EXACT), share=1.0)

    with pytest.raises(WrongAnswer, match="decode: Dense attends to all keys and is off"):
        list(case.measured("decode", ENTRIES["decode"], off, print))  # type: ignore[arg-type]


def test_what_cannot_be_served_is_noted_and_the_others_go_on() -> None:
    notes: list[str] = []
    layer = prompt()
    entries = [Entry(Dense(), False), Entry(BlockSampled(density=0.1), True), Entry(StreamingLLM(window=64), False)]
    known = [leaderboard_prefill.exact(layer)]
    found = case.measured(
        "prefill", entries, lambda policy: leaderboard_prefill.run([layer], known, policy), notes.append
    )
    assert [row["method"] for row in found] == ["Dense", "StreamingLLM"]
    assert len(notes) == 1
    assert "prefill without BlockSampled density=0.1: density must be above" in notes[0]


@pytest.mark.parametrize(
    "policy", [Dense(), TopR(30), Certified(0.2), Certified(0.2, bytes_per_key=8), Sampled(budget=30), Quest(64)]
)
def test_a_watched_policy_tells_exactly_the_keys_that_it_attends_to(policy: object) -> None:
    """Values that are a token's own unit vector show every weight, of at least 1e-6; keys not told of have none."""
    n, h = 300, 4
    random = torch.Generator().manual_seed(3)
    k, q = torch.randn(2, n, D, generator=random), torch.randn(h, 1, D, generator=random)
    values = torch.eye(n).expand(2, n, n).contiguous()
    seen = watched(policy)
    plain = DecodeSession(k, values, policy=policy, queries=q).attend(q)  # type: ignore[arg-type]
    found = DecodeSession(k, values, policy=seen.policy, queries=q).attend(q)
    assert torch.equal(found.output, plain.output)
    kept = seen.take()
    assert kept is not None and kept.means is None
    mask = kept.mask
    assert torch.equal(mask.repeat_interleave(h // len(mask), 0), found.output[:, 0] > 1e-7)
    assert seen.take() is None


def test_a_prompts_mass_is_that_of_its_lists() -> None:
    layer = prompt()
    known = leaderboard_prefill.exact(layer)
    for policy in (StreamingLLM(window=64), BlockSampled(density=0.5), leaderboard_roster.Oracle("block-oracle", 0.6)):
        found = leaderboard_prefill.mass(leaderboard_prefill.lists(policy, layer), torch.zeros(0), known)
        assert 0.1 < found < 1
        if not isinstance(policy, BlockSampled):  # its weights are not 1
            lse = torch.from_numpy(prefill(*layer, policy=policy).lse)
            assert found == pytest.approx(leaderboard_prefill.mass(None, lse, known), abs=1e-5)


def test_what_is_read_counts_codes_and_the_union_of_a_group() -> None:
    layer = prompt()
    known = leaderboard_decode.exact(layer)
    steps = list(leaderboard_decode.decoded(layer, known, Dense()))
    assert [step.read for step in steps] == [4 * D * (N - leaderboard_decode.STEPS + t + 1) for t in range(len(steps))]
    quest = Quest(64)
    for t, step in enumerate(leaderboard_decode.decoded(layer, known, quest)):
        attended = step.read - quest.bytes_read(N - leaderboard_decode.STEPS + t + 1, D, 2)
        assert 4 * D * 48 <= attended <= 4 * D * 2 * 64


def test_the_roster_has_every_selector_and_a_new_one_by_its_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Newest(StreamingLLM):
        pass

    module = types.ModuleType("attention.selectors.newest")
    Newest.__module__ = module.__name__
    vars(module)["Newest"] = Newest
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = list(selectors.pkgutil.iter_modules(selectors.__path__))
    added = types.SimpleNamespace(name="newest")
    monkeypatch.setattr(selectors.pkgutil, "iter_modules", lambda _: [*known, added])
    found = leaderboard_roster.prefill(8192, HeadClusters(((0,),)))
    assert found[0].policy == Dense() and leaderboard_roster.decode(8192)[0].policy == Dense()
    assert [entry.policy for entry in found if entry.method == "Newest"] == list(Newest.examples())
    every = {entry.method for entry in [*found, *leaderboard_roster.decode(8192)]}
    assert every >= set(selectors.catalogue(leaderboard_roster.Selector))
    assert every >= set(selectors.catalogue(leaderboard_roster.DecodeSelector))


def test_the_front_is_what_nothing_beats() -> None:
    rows = [{"share": x, "rel_err": y} for x, y in ((3, 1), (1, 5), (2, 6), (2, 4), (4, 1), (1, 7))]
    assert [(row["share"], row["rel_err"]) for row in leaderboard_figures.front(rows, "share")] == [
        (1, 5), (2, 4), (3, 1),
    ]  # fmt: skip

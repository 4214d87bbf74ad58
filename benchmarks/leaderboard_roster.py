"""Who is on the leaderboard, and at which settings: oracles, published systems and ours.

Budgets are shares of the text, so that short and long ones compare.  A selector of `attention.selectors` for which
nothing is said here takes part by its examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from attention import BlockSampled, Certified, Dense, Sampled, TopR
from attention.decode_selector import DecodeSelector
from attention.head_clusters import HeadClusters
from attention.key_lists import KeyLists, edges
from attention.list_tail import ListTail
from attention.selector import ListMaker, Selector
from attention.selectors import (
    DoubleSparsity,
    FlashPrefill,
    FlexPrefill,
    MagicPIG,
    MInference,
    PowerAttention,
    Quest,
    RetroInfer,
    SharePrefill,
    SlashVerticalHorizontal,
    SqueezedAttention,
    StreamingLLM,
    Tactic,
    TokenSelect,
    TopOracle,
    VAttention,
    XAttention,
    catalogue,
)
from attention.selectors.squeezed_attention import PrefixClusters
from attention.skip_softmax import SkipSoftmax
from attention.step_tail import StepTail
from attention.with_tail import WithTail
from benchmarks.prefill_oracles import RULES, Head
from hsr.errors import ArgumentError, BackendUnavailable

REFUSALS = (ArgumentError, BackendUnavailable)
OURS = (BlockSampled, Certified, Sampled, TopR, ListTail, StepTail, SlashVerticalHorizontal)
SHARES = (0.025, 0.05, 0.1, 0.2)


class Entry(NamedTuple):
    """A method at a setting."""

    policy: Any
    ours: bool

    @property
    def method(self) -> str:
        """Its name, and that of what it wraps."""
        inner = getattr(self.policy, "selector", None)
        return type(self.policy).__name__ + (f"({type(inner).__name__})" if inner else "")

    @property
    def setting(self) -> str:
        """What differs from the defaults."""
        return _setting(self.policy)


def _setting(policy: Any) -> str:
    changed = []
    for field in fields(policy):
        value = getattr(policy, field.name)
        if isinstance(value, ListMaker | DecodeSelector | PrefixClusters):
            changed.append(_setting(value))
        elif field.repr and not isinstance(value, HeadClusters) and value != field.default:
            changed.append(f"{field.name}={value:.4g}" if isinstance(value, float) else f"{field.name}={value}")
    return " ".join(part for part in changed if part)


@dataclass(frozen=True)
class Oracle(ListMaker):
    """A rule of `benchmarks.prefill_oracles`: the best sets of that density, by all probabilities."""

    rule: str
    density: float

    causal = False

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `attention.selector.ListMaker`; every row's probabilities are computed."""
        n = k.shape[1]
        edge = torch.from_numpy(edges(n, n)).to(q.device)[:, None]
        eligible = torch.arange(n, device=q.device) < edge  # (T, n)
        found = []
        for i in range(len(q)):
            keys = k[i * len(k) // len(q)].float()
            chosen = RULES[self.rule](Head(q[i].float(), keys, keys), self.density)
            if chosen is None:
                raise ArgumentError(f"density must pay for the keys that {self.rule} forces; got {self.density}")
            found.append(chosen & eligible)
        mask = torch.cat(found)  # (H T, n)
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return KeyLists(offsets, mask.nonzero()[:, 1].int())


def decode(n: int) -> list[Entry]:
    """Policies of `attention.DecodeSession` for a cache of n tokens."""
    budgets = [round(share * n) for share in SHARES]
    named: dict[type, Sequence[Any]] = {
        Dense: [Dense()],
        TopOracle: [TopOracle(budget) for budget in (*budgets, n)],
        Quest: [Quest(budget) for budget in budgets],
        TokenSelect: [TokenSelect(budget // 2, sinks=budget // 8, window=3 * budget // 8) for budget in budgets],
        DoubleSparsity: [DoubleSparsity(budget) for budget in budgets],
        Tactic: [Tactic(share, dense_below=1024) for share in (0.5, 0.75, 0.9)],
        SqueezedAttention: [SqueezedAttention(PrefixClusters(sparsity=share)) for share in (0.7, 0.8, 0.9)]
        + [SqueezedAttention(PrefixClusters(coarse=0.01, sparsity=0.9))],
        RetroInfer: [RetroInfer(retrieved=share) for share in (0.018, 0.05, 0.1)],
        VAttention: [
            VAttention(eps, heavy=share, base=share) for eps, share in ((0.2, 0.01), (0.1, 0.025), (0.05, 0.1))
        ],
        MagicPIG: [MagicPIG(planes, tables) for planes, tables in ((10, 150), (8, 75))],
        StepTail: [
            WithTail(inner, sampled=budget // 2)
            for budget in budgets
            for inner in (Quest(budget // 2), DoubleSparsity(budget // 2))
        ],
        TopR: [TopR(budget) for budget in budgets] + [TopR()],
        Certified: [Certified(0.05), Certified(0.05, bytes_per_key=24)],
        Sampled: [Sampled(budget=budget // 2, bytes_per_key=code) for code in (16, 32) for budget in budgets],
    }
    return list(_entries(named, DecodeSelector))


def prefill(n: int, clusters: HeadClusters) -> list[Entry]:
    """Policies of `attention.prefill` for a prompt of n tokens; clusters are of its layers' heads."""
    named: dict[type, Sequence[Any]] = {
        Dense: [Dense()],
        Oracle: [Oracle(rule, share) for rule in ("block-oracle", "token-oracle") for share in (0.05, 0.1, 0.2)],
        StreamingLLM: [StreamingLLM(window=round(share * n)) for share in (0.05, 0.1, 0.2)],
        PowerAttention: [PowerAttention(window=blocks) for blocks in (2, 8)],
        MInference: [MInference(n // 64, 100 + n // 64), MInference(n // 16, 100 + n // 16)],
        FlexPrefill: [
            FlexPrefill(gamma, min_budget=256, published=published)
            for published in (False, True)
            for gamma in (0.75, 0.9, 0.95)
        ],
        SharePrefill: [SharePrefill(clusters, gamma=gamma, min_budget=256) for gamma in (0.75, 0.9)],
        SkipSoftmax: [SkipSoftmax(threshold) for threshold in (1e-2, 1e-3, 1e-4)],
        FlashPrefill: [FlashPrefill(alpha, last=2) for alpha in (0.8, 0.3, 0.1)]
        + [FlashPrefill(0.3, last=2, means=False)],
        XAttention: [XAttention(share) for share in (0.7, 0.8, 0.9)],
        SlashVerticalHorizontal: [SlashVerticalHorizontal(share) for share in (0.4, 0.2, 0.1)],
        BlockSampled: [BlockSampled(density=share, rows=rows) for rows in (4, 8, 32) for share in (0.05, 0.1, 0.2)]
        + [BlockSampled(density=share, causal_selection=True) for share in (0.05, 0.1, 0.2)],
        ListTail: [
            WithTail(FlexPrefill(0.75, min_budget=256), sampled=128),
            WithTail(FlashPrefill(0.8, last=2, means=False), sampled=128),
            WithTail(XAttention(0.7), sampled=128),
            WithTail(XAttention(0.7), means=True),
        ],
    }
    return list(_entries(named, Selector))


def _entries(named: dict[type, Sequence[Any]], kind: type) -> Iterator[Entry]:
    others: dict[type, Sequence[Any]] = {
        found: found.examples() for found in catalogue(kind).values() if found not in named
    }
    for method, policies in (named | others).items():
        yield from (Entry(policy, method in OURS) for policy in policies)

"""Sparse prefill: blocks of 128 rows share keys that are drawn by importance, with one threshold for a head.

What real heads say (SmolLM2, 8192 tokens, a tenth of the pairs): errors over those of the best 128 x 128 blocks of each
head by true mass, over all 270 heads 0.25 as it stands, 0.28 with one representative, 0.27 with 2, 0.26 with 4, 0.22
with 32 and 0.21 with 64 (`python -m benchmarks.run prefill-accuracy`); the worst head's is 1.3, 1.6, 1.5, 1.4, 1.0 and
1.0, and at a fifth of the pairs 1.5, 2.1, 2.0, 1.7, 1.4 and 1.2. One mean of sixteen rows had 0.25 over 90 heads, of
eight 0.26, of 32 0.25; more rows made no difference to several representatives either. With single rows as
representatives they were 0.33 with 4, 0.29 with 8 and 0.24 with 32, the worst head's 3.3, 2.5 and 1.2. Over 63 heads of
seven layers two representatives have 0.31 as single rows, 0.28 as means of two neighbours, 0.24 of eight, 0.22 of eight
rows evenly spaced in their half of the block, as of all 64.

With 8 single rows, for 33 heads of 10 layers and every eighth block: 0.31 and

- rows far from the block's mean or from each other did no better;
- 0.30 with exact log-sums, which cost a second pass over the keys; 0.50 where the first key block, which holds the
  sink, counts by its mean key, too;
- 0.35 with the mean key's share of all 128 rows instead of the representatives'; 0.41 with the block's mass by their
  exact scores instead of its mean key; 0.87 against 0.48 (by predicted variance) without any share of the block's:
  then keys that the representatives do not need are drawn too seldom for the rows that do;
- 0.33 without the values' distances;
- 0.63 against 0.48 (by predicted variance) where weights are smeared along diagonals, for heads that look back by a
  fixed distance: they gain less than the others lose;
- with a causal selection, over all heads, mean errors 0.200, 0.085 and 0.037 at 5, 10 and 20 % where those of the
  default are 0.150, 0.065 and 0.028: its representatives cost that, its thresholds nothing (with single rows and over
  90 heads 0.197, 0.083 and 0.036, with one threshold for the head 0.200, 0.084, 0.037).  Three others lost: the
  threshold at which all blocks so far would have spent the density's share of them (half of the keys listed, 0.268,
  0.181, 0.101), that with what is unspent added (0.271, 0.171, 0.092), and a future that grows as the keys do, which
  keeps too much for the end (0.262, 0.124, 0.063).

With means of rows, for 30 heads of ten layers and every eighth block, over the error of the systematic draw in the
order of the keys (in the median): 1.04 with independent draws, 1.03 with a systematic draw in the order of
importance, 1.00 with the key blocks' mean keys and values as control variates, whole or halved, and 1.19, in one head
78, where those know the keys' second moments, too.

Heavy blocks taken whole would be a choice of their own; drawn by the same importance their keys are certain anyway.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attention import prompt_cost, reference
from attention.chances import starts
from attention.key_lists import KEYS, budget, least_density, row_blocks
from attention.shared_prompt import Answer, SharedPrompt
from attention.weights import Softmax
from hsr import checks
from hsr.backend import choose
from hsr.errors import ArgumentError

MEASURED = 64  # rows of a head on which its error is measured
SHARE = 0.03  # of the keys beside the bands that a search for a density begins with
FALL = 1.2  # the error falls about as that share to the power -1 / FALL


def measured_rows(seed: int, heads: int, m: int) -> np.ndarray:
    """Rows on which errors are measured, (H, s) int64: others than `attention.audit` draws, whose seed is a number."""
    rng = np.random.default_rng((seed, MEASURED))
    return np.array([rng.choice(m, min(MEASURED, m), replace=False) for _ in range(heads)])


@dataclass(frozen=True)
class BlockSampled:
    """An unbiased sample of keys for every 128 rows of a prompt: lifted half-space reporting for blocks of rows.

    Rows attend exactly to the keys near them: those from the last multiple of 128 before their block on. Of older keys,
    a few representatives of the block, means of some rows each (`attention.key_lists.spoken`), estimate the importance
    x_j, a root mean square of weights, times ``||v_j - c||``; key j is drawn with chance ``min(1, x_j / 2^T)`` and then
    weighs ``exp(s_j) / chance`` with exact scores. T is chosen for each head so that its blocks list as many keys
    together as the density allows: a block that needs more gets more. Sums of weights and of weighted values are
    unbiased over seeds.

    `prefill` returns a `BlockResult`: the output in q's dtype, lse, the densities reached, and counters: ``reported``
    and ``scanned`` are the keys that a row attends to, its near ones included, ``visited`` the codes of its block.

    It serves `prefill` with ``causal=True`` and softmax alone.  Its certificate claims nothing (kind "none"); `audit`
    bounds the error of what it returned from exact attention on sampled rows, and escalates from it.

    By default a head's threshold depends on all its rows, and a block's importances on rows anywhere in it: a later
    token can change which of the old keys an earlier row is shown, even in another block, and so that row's output,
    though scores and values stay its own.  That is harmless for the prefill of one prompt; do not train or score token
    by token with it.  ``causal_selection=True`` takes no decision for a row by anything after it, bit for bit, at the
    same length.  Each block then has a threshold of its own, at which it and the blocks to come, if like those so far,
    spend what is left of the head's keys.  No head expects more than the density allows; at 8,192 tokens real heads
    list up to 0.3 % less beside their bands, prompts of a few blocks up to a sixth less.

    Args:
        density: share of the visible keys that is attended to, in (0, 1]; it must exceed what the near keys make, about
            ``256 / n`` of a whole prompt.
        error: or else the mean relative error of the output, ``||output - exact|| / ||exact||``, that each head is
            brought to: measured exactly on 64 random rows of it, heads that miss it get more keys, in the end all of
            them.  A target met on a sample, not a bound.  Rows are chosen among all of a prompt, so that
            ``causal_selection`` is refused here.
        seconds: or else the time that the call should take, by rates measured once in the process for the call's widths
            and dtype.  Approximate: other work on the machine counts, and never fewer keys than one a block are listed.
        rows: representatives of a block, a divisor of 128: 1 where time counts, 64 where the hardest heads do; the
            longer the prompt, the more they matter.
        causal_selection: decide by the first row of a block and ones before it, with a threshold for every block.
        seed: of the draws, 0 .. 2**63 - 1.  Give layers different seeds, so that their errors are independent.

    Raises:
        ArgumentError: not exactly one of density, error and seconds, or a value out of range.

    Source: threshold sampling (Duffield, Lund & Thorup 2007) of half-spaces, arXiv 2410.10165, for blocks of rows.
    """

    shared: ClassVar[bool] = True

    density: float | None = None
    error: float | None = None
    seconds: float | None = None
    rows: int = 8
    causal_selection: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        asked = {name: getattr(self, name) for name in ("density", "error", "seconds")}
        if sum(value is not None for value in asked.values()) != 1:
            given = ", ".join(f"{name}={value}" for name, value in asked.items())
            raise ArgumentError(f"BlockSampled needs one of density, error and seconds; got {given}")
        for name, below in (("density", np.nextafter(1, 2)), ("error", math.inf), ("seconds", math.inf)):
            if asked[name] is not None:
                checks.real(name, asked[name], np.nextafter(0, 1), below)
        if KEYS % checks.whole("rows", self.rows, 1, KEYS):
            raise ArgumentError(f"rows must divide {KEYS}; got {self.rows}")
        if not isinstance(self.causal_selection, bool):
            raise ArgumentError(f"causal_selection must be True or False; got {self.causal_selection!r}")
        if self.causal_selection and self.error is not None:
            raise ArgumentError(
                "causal_selection must be False with error, which is measured on rows of all the prompt"
            )
        checks.whole("seed", self.seed, 0, 2**63 - 1)

    def tighter(self, n: int) -> BlockSampled | None:
        """Twice the density, or half the error; None where all keys are next, and for a limit of time."""
        if self.density is not None and self.density < 0.5:
            return dataclasses.replace(self, density=2 * self.density)
        if self.error is not None and self.error > 2e-3:
            return dataclasses.replace(self, error=self.error / 2)
        return None

    def visited(self, edges: np.ndarray) -> np.ndarray:
        """Every eligible key has a code."""
        return edges

    def answer(self, prompt: SharedPrompt) -> Answer:
        """By whichever of density, error and seconds there is."""
        heads, m, n = prompt.shape
        if self.error is not None:
            return self._within(self.error, prompt)
        if self.density is not None:
            budget(self.density, m, n)  # refuses one that the bands exceed
        density = self._affordable(prompt) if self.density is None else self.density
        return self._at(np.full(heads, density), prompt, starts(self.seed, heads, row_blocks(m)))

    def _at(self, densities: np.ndarray, prompt: SharedPrompt, first: np.ndarray) -> Answer:
        """Densities (H,), first (H, T) where the draws begin."""
        draw = choose("key_lists", prompt.method)
        arrays = prompt.q, prompt.k, prompt.v
        return prompt.attended(draw(*arrays, densities, first, self.rows, self.causal_selection, prompt.scale))

    def _affordable(self, prompt: SharedPrompt) -> float:
        assert self.seconds is not None
        widths = prompt.k.shape[2], prompt.v.shape[2]
        rates = prompt_cost.rates(*widths, str(prompt.k.dtype), self.rows, prompt.method)
        return prompt_cost.density_for(self.seconds, prompt.shape, rates)

    def _within(self, error: float, prompt: SharedPrompt) -> Answer:
        """Each head at the first of rising densities whose mean error on `measured_rows` is small enough."""
        heads, m, n = prompt.shape
        least, first = least_density(m, n), starts(self.seed, heads, row_blocks(m))
        answer = self._at(np.full(heads, least + SHARE * (1 - least)), prompt, first)
        measured = measured_rows(self.seed, heads, m)
        for head in range(heads):
            one, rows = prompt.of(head), measured[head]
            seen = np.arange(n) <= n - m + rows[:, None]
            exact = reference.dense(one.q[:, rows], one.k, one.v, Softmax(), one.scale, keep=seen)[0][0]
            share = SHARE
            while (found := _mean_error(answer.output[head, rows], exact)) > error and share < 1:
                share = min(share * max(2.0, (found / error) ** FALL), 1.0)
                better = self._at(np.array([least + share * (1 - least)]), one, first[head : head + 1])
                for name, part in vars(better).items():
                    getattr(answer, name)[head] = part[0]
        return answer


def _mean_error(output: np.ndarray, exact: np.ndarray) -> float:
    """Relative errors of rows (s, dv), their mean; of a row that is exactly zero, 0 or infinite."""
    off, size = np.linalg.norm(output - exact, axis=1), np.linalg.norm(exact, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(off == 0, 0.0, off / size).mean())

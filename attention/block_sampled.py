"""Sparse prefill: blocks of 128 rows share keys that are drawn by importance, with one threshold for a head."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from attention import prompt_cost, reference
from attention.chances import starts
from attention.engine import prompt_arrays
from attention.key_lists import KEYS, KeyLists, edges, least_density, row_blocks
from attention.result import Certificate, Counters, Result
from attention.weights import ReLUPower, Softmax
from hsr import checks
from hsr.backend import choose
from hsr.errors import ArgumentError

LARGEST = {"float32": 1e30, "float64": 1e150}  # of a scaled query, a score or a value: squares or sums stay finite
MEASURED = 64  # rows of a head on which its error is measured
SHARE = 0.03  # of the keys beside the bands that a search for a density begins with
FALL = 1.5  # the error falls about as the density to the power -1 / FALL


@dataclass(frozen=True)
class BlockResult(Result):
    """Attention over lists that blocks of rows share.

    Attributes:
        densities: (..., h) float64; the share of the keys seen by the last row of each block that was attended to,
            over all blocks of a head.
    """

    densities: np.ndarray


@dataclass(frozen=True)
class BlockSampled:
    """An unbiased sample of keys for every 128 rows of a prompt: lifted half-space reporting for blocks of rows.

    Rows attend exactly to the keys near them: those from the last multiple of 128 before their block on.  Of older
    keys, a few representative rows of the block estimate the importance x_j, a root mean square of weights, times
    ``||v_j - c||``; key j is drawn with chance ``min(1, x_j / 2^T)`` and then weighs ``exp(s_j) / chance`` with exact
    scores.  T is chosen for each head so that its blocks list as many keys together as the density allows: blocks, and
    rows, that need more get more.  Sums of weights and of weighted values are unbiased over seeds.

    It serves `prefill` with ``causal=True`` and softmax alone.  Its certificate claims nothing (kind "none"); `audit`
    bounds the error of what it returned from exact attention on sampled rows, and escalates from it.

    By default a head's threshold depends on all its rows: a later token can change which keys an earlier row attends
    to, and so that row's output, though never what a key there weighs or is.  That is a leak of selection, harmless for
    the prefill of one prompt; do not train or score token by token with it.  ``causal_selection=True`` takes no
    decision for a row by anything after it, bit for bit, at the same length; blocks then spend what the density has
    left by their turn, at least 32 keys each, so that the density of a whole head differs from the one asked for.

    Args:
        density: share of the visible keys that is attended to, in (0, 1]; it must exceed what the near keys make, about
            ``256 / n`` of a whole prompt.
        error: or else the mean relative error of the output, ``||output - exact|| / ||exact||``, that each head is
            brought to: measured exactly on 64 random rows of it, heads that miss it get more keys, in the end all of
            them.  A target met on a sample, not a bound.  Rows are chosen among all of a prompt, so that
            ``causal_selection`` is refused here.
        seconds: or else the time that the call should take, by rates measured once in the process for the call's widths
            and dtype.  Approximate: other work on the machine counts, and never fewer keys than one a block are listed.
        rows: representative rows of a block, a divisor of 128.
        causal_selection: decide by the first row of a block and ones before it, with a threshold for every block.
        seed: of the draws, 0 .. 2**63 - 1.  Give layers different seeds, so that their errors are independent.

    Raises:
        ArgumentError: not exactly one of density, error and seconds, or a value out of range.

    Source: threshold sampling (Duffield, Lund & Thorup 2007) of half-spaces, arXiv 2410.10165, for blocks of rows.
    """

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

    def attend_prompt(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool,
        weight: Softmax | ReLUPower,
        scale: float | None,
        method: str,
    ) -> BlockResult:
        """Arguments as of `attention.prefill`; method names rows of the operations ``key_lists`` and ``listed``.

        Raises:
            ArgumentError: as for `attention.prefill`; causal=False, a weight other than Softmax(), a density that the
                bands alone exceed; scores or values beyond 1e30 in float32 (and narrower), 1e150 in float64.
        """
        if not isinstance(weight, Softmax):
            raise ArgumentError(f"weight must be Softmax() for {self!r}; got {weight!r}")
        if not causal:
            raise ArgumentError(f"causal must be True for {self!r}; got {causal!r}")
        queries, keys, values, limits = prompt_arrays(q, k, v, causal)
        factor = keys.shape[2] ** -0.5 if scale is None else checks.real("scale", scale, np.nextafter(0, 1), math.inf)
        _check_range(queries, keys, values, factor)
        heads, m, n = len(queries), queries.shape[1], keys.shape[1]
        first = starts(self.seed, heads, row_blocks(m))
        answer = _Prompt(queries, keys, values, first, factor, self, "numba" if method == "auto" else method).answer()
        block = np.arange(m) // KEYS
        seen = limits - edges(m, n)[block]
        reported = np.take_along_axis(answer.counts, np.broadcast_to(block, limits.shape), axis=1) + seen
        visited = np.broadcast_to(edges(m, n)[block], limits.shape)
        unknown = np.full(limits.shape, np.inf)
        result = Result(
            answer.output.astype(np.float64),
            answer.lse,
            np.zeros(limits.shape, bool),
            Certificate("none", unknown, unknown, unknown, unknown),
            Counters(reported, visited, reported),
            n,
        ).shaped(tuple(q.shape[:-1]), q)
        return BlockResult(**vars(result), densities=answer.densities.reshape(tuple(q.shape[:-2])))


@dataclass
class _Answer:
    """Of H heads."""

    output: np.ndarray  # (H, m, dv)
    lse: np.ndarray  # (H, m)
    counts: np.ndarray  # (H, T), keys listed
    densities: np.ndarray  # (H,)


@dataclass(frozen=True)
class _Prompt:
    """What is attended to, checked, and how."""

    q: np.ndarray  # (H, m, d)
    k: np.ndarray  # (G, n, d)
    v: np.ndarray  # (G, n, dv)
    starts: np.ndarray  # (H, T), of draws
    scale: float
    policy: BlockSampled
    method: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, m, n."""
        return len(self.q), self.q.shape[1], self.k.shape[1]

    def of(self, head: int) -> _Prompt:
        """One head alone."""
        source = head * len(self.k) // len(self.q)
        one, read = slice(head, head + 1), slice(source, source + 1)
        return dataclasses.replace(self, q=self.q[one], k=self.k[read], v=self.v[read], starts=self.starts[one])

    def answer(self) -> _Answer:
        """By whichever of density, error and seconds the policy has."""
        heads, m, n = self.shape
        if self.policy.error is not None:
            return self._within(self.policy.error, least_density(m, n))
        return self._at(np.full(heads, self.policy.density or self._affordable()))

    def _affordable(self) -> float:
        assert self.policy.seconds is not None
        widths = self.k.shape[2], self.v.shape[2]
        rates = prompt_cost.rates(*widths, str(self.k.dtype), self.policy.rows, self.method)
        return prompt_cost.density_for(self.policy.seconds, self.shape, rates)

    def _at(self, densities: np.ndarray) -> _Answer:
        heads, m, n = self.shape
        draw, attend = choose("key_lists", self.method), choose("listed", self.method)
        how = self.policy.rows, self.policy.causal_selection, self.scale
        lists: KeyLists = draw(self.q, self.k, self.v, densities, self.starts, *how)
        output, lse = attend(self.q, self.k, self.v, lists, self.scale)
        return _Answer(output, lse, np.diff(lists.token_offsets).reshape(heads, -1), lists.densities(m, n))

    def _within(self, error: float, least: float) -> _Answer:
        """Each head at the first of rising densities whose mean error on MEASURED rows is small enough."""
        heads, m, n = self.shape
        first = least + (1 - least) * SHARE
        answer = self._at(np.full(heads, first))
        rng = np.random.default_rng(self.policy.seed)
        for head in range(heads):
            one, rows = self.of(head), rng.choice(m, min(MEASURED, m), replace=False)
            seen = np.arange(n) <= n - m + rows[:, None]
            exact = reference.dense(one.q[:, rows], one.k, one.v, Softmax(), self.scale, keep=seen)[0][0]
            density = first
            while (found := _mean_error(answer.output[head, rows], exact)) > error and density < 1:
                density = min(density * max(2.0, (found / error) ** FALL), 1.0)
                better = one._at(np.array([density]))
                for name, part in vars(better).items():
                    getattr(answer, name)[head] = part[0]
        return answer


def _mean_error(output: np.ndarray, exact: np.ndarray) -> float:
    """Relative errors of rows (s, dv), their mean; of a row that is exactly zero, 0 or infinite."""
    off, size = np.linalg.norm(output - exact, axis=1), np.linalg.norm(exact, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(off == 0, 0.0, off / size).mean())


def _check_range(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> None:
    """Refuse what would overflow on the way."""
    largest = LARGEST[q.dtype.name]
    with np.errstate(over="ignore"):
        asked = scale * np.sqrt((q.astype(np.float64) ** 2).sum(axis=2).max())
        score = asked * np.sqrt((k.astype(np.float64) ** 2).sum(axis=2).max())
    for what, found in (("q and k", max(asked, score)), ("v", np.abs(v).max(initial=0.0))):
        if not found <= largest:
            kind = "entries" if what == "v" else "scaled queries and scores"
            raise ArgumentError(f"{what} must have {kind} of at most {largest:.0e} in {q.dtype}; got {found:.3g}")

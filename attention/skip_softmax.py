"""Skip-softmax: flash attention that does not weigh the key blocks whose scores lie far below those met before.

Why the error is certain.  A row's M, the largest score met so far, only grows, and a block is skipped where its
largest score b is below ``M + ln lambda``.  At the end M is the largest score of all keys: attended blocks are in it,
and skipped ones lie below an earlier M.  So each skipped key weighs less than lambda relative to the heaviest key,
whose block was attended to; the attended weight W, relative to that key, is at least 1; and c skipped keys hold

    D <= sum over skipped blocks of c_block exp(b_block - M) <= c lambda,    a share D / (D + W) <= c lambda of all.

The kernels carry the first sum, which is sharper, beside the output; `certify` turns it into bounds on the output and
the log-sum-exp.  Rounding: computed scores lie within an error e of the true ones, so that D may be larger and W
smaller by ``exp(e)``, which `certify` counts twice.  Sums of at most n terms, with their exponentials and fading
factors, are within ``2 (n + 16) 2^-53`` of themselves; that is added to ln D for D and for W.  The rule itself may go
either way within rounding: the bound is of what was skipped, for whatever reason.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from attention.key_lists import ROWS, ends
from attention.result import UNIT, Certificate, Counters, certify
from attention.shared_prompt import Answer, BlockResult, SharedPrompt
from attention.skip_softmax_reference import Skipped
from attention.values import Values
from attention.weights import Softmax
from hsr import checks
from hsr.backend import choose
from hsr.errors import ArgumentError

LEAST = 1e-6  # of the mass: less than this needs no tighter setting


@dataclass(frozen=True)
class SkipResult(BlockResult):
    """Attention of which key blocks were skipped.

    Attributes:
        skipped: (..., h, T) int64; of each block of 128 rows, the blocks of 64 keys that it skipped.
    """

    skipped: np.ndarray


@dataclass(frozen=True)
class SkipSoftmax:
    """Exact scores of all keys; blocks of keys far below the best so far are neither weighed nor their values read.

    Blocks of 128 rows visit blocks of 64 keys from the first key on, so that sinks are met early, and skip one whose
    largest score is below the largest so far by more than ``ln(1 / lambda)`` in every row.  It is flash attention with
    less to do: half of the products at best.

    On the CPU, where it computes in float64, the certificate is deterministic: a row drops at most lambda times the
    keys it skipped, ``factor`` of its mass at most, and what it skipped is bounded more sharply still.  On a GPU, whose
    products round as they like, it claims nothing; `audit` measures.  Rows see only what lies before them, and
    rows of a block are decided for together: a block is skipped only where all of them agree.

    `prefill` returns a `SkipResult`; its counters' ``scanned`` are the keys a row sees, ``reported`` those it attends
    to, and its densities count the last row of each block.  It serves causal softmax prefill alone.

    The paper gives lambda as a factor over the length, with one factor for a model that calibration finds (none is
    built in here), and its kernels' blocks are of 128 rows and 128 keys; smaller ones skip more.

    Args:
        threshold: lambda, in [0, 1]; 0 skips nothing.
        factor: or lambda times the number of keys, at least 0: at most this share of a row's mass is dropped.

    Raises:
        ArgumentError: not exactly one of them, or a value out of range.

    Source: BLASST, arXiv 2512.12087.
    """

    shared: ClassVar[bool] = True

    threshold: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.factor is None):
            raise ArgumentError(
                f"SkipSoftmax needs one of threshold and factor; got threshold={self.threshold}, factor={self.factor}"
            )
        for name, below in (("threshold", np.nextafter(1, 2)), ("factor", math.inf)):
            if getattr(self, name) is not None:
                checks.real(name, getattr(self, name), 0.0, below)

    def level(self, n: int) -> float:
        """``ln lambda`` for n keys; -inf for 0."""
        share = self.threshold if self.factor is None else min(self.factor / n, 1.0)
        return math.log(share) if share else -math.inf

    def tighter(self, n: int) -> Self | None:
        """A quarter of lambda; None where little is left to drop."""
        if math.exp(self.level(n)) * n <= LEAST:
            return None
        if self.factor is not None:
            return dataclasses.replace(self, factor=min(self.factor, n) / 4)
        assert self.threshold is not None
        return dataclasses.replace(self, threshold=self.threshold / 4)

    def visited(self, edges: np.ndarray) -> np.ndarray:
        """No code is looked at."""
        return np.zeros_like(edges)

    def answer(self, prompt: SharedPrompt) -> Answer:
        """Attention with what it is certain of."""
        _, m, n = prompt.shape
        run = choose("skip_softmax", prompt.method)
        found: Skipped = run(prompt.q, prompt.k, prompt.v, self.level(n), prompt.scale)
        last = np.minimum(ROWS * (np.arange(found.blocks.shape[1]) + 1), m) - 1
        attended = found.kept[:, last]
        return SkippedAnswer(
            found.output, found.lse, attended, attended.sum(axis=1) / ends(m, n).sum(), found, prompt
        )  # fmt: skip


@dataclass
class SkippedAnswer(Answer):
    """Of H heads; counts (H, T) are the keys that the last row of each block attended to."""

    found: Skipped
    prompt: SharedPrompt

    def counters(self, limits: np.ndarray, visited: np.ndarray) -> Counters:
        """Every visible key is scored."""
        return Counters(limits, visited, self.found.kept)

    def certificate(self, dtype: str) -> Certificate:
        """From the sum over the blocks skipped; see the module."""
        prompt, found = self.prompt, self.found
        d, n = prompt.k.shape[2], prompt.k.shape[1]
        largest = np.repeat(np.abs(prompt.k.astype(np.float64)).max(axis=(1, 2)), len(prompt.q) // len(prompt.k))
        error = (d + 4) * 2.0**-52 * np.abs(prompt.q.astype(np.float64)).sum(axis=2) * largest[:, None] * prompt.scale
        exact = not found.blocks.any()
        return certify(
            found.output,
            found.lse,
            np.zeros(found.lse.shape),
            found.log_dropped + 4 * (n + 16) * UNIT,
            np.minimum(error, 300.0),  # of which exp(e) is finite and nothing is known any more
            found.kept,
            Values(prompt.v),
            dtype,
            Softmax(),
            "exact" if exact else "deterministic",
        )

    def result(self, limits: np.ndarray, visited: np.ndarray, q: Any, n: int) -> SkipResult:
        """See `Answer`."""
        made = super().result(limits, visited, q, n)
        return SkipResult(**vars(made), skipped=self.found.blocks.reshape(*q.shape[:-2], -1))

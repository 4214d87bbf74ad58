"""What the two parts of the leaderboard share: the clock, a policy that is watched, and the figures of a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attention import Result, audit
from attention.result import Certificate, Counters
from benchmarks.ledger import MILLI, Row
from benchmarks.real_keys import Prompt

CUDA = torch.cuda.is_available()
HERE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
AUDITED = 8  # rows of each head that an audit may look at


@dataclass(frozen=True)
class Found:
    """Of one method and setting, over layers B, heads h and rows m; seconds of each call."""

    errors: np.ndarray  # (B, h, m)
    bound: float  # the audit's
    mass: float | None
    share: float
    seconds: Sequence[float]
    dense: float  # seconds
    select: Sequence[float] = ()
    kilobytes: float | None = None
    looks_ahead: bool = False

    def row(self) -> Row:
        """The columns that this fills."""
        taken = float(np.median(self.seconds))
        return {
            "looks_ahead": self.looks_ahead,
            "rel_err": float(self.errors.mean()),
            "rel_err_p90": float(np.percentile(self.errors, 90)),
            "audit": self.bound,
            "kept_mass": self.mass,
            "share": self.share,
            "kilobytes": self.kilobytes,
            "select_ms": float(np.median(self.select)) * MILLI if len(self.select) else None,
            "ms": taken * MILLI,
            "dense_ms": self.dense * MILLI,
            "speedup": self.dense / taken,
        }


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call took, the GPU's part too, and what it returned."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def relative(output: torch.Tensor, exact: torch.Tensor) -> np.ndarray:
    """Errors (..., m) of rows (..., m, d)."""
    found = (output.double() - exact.double()).norm(dim=-1) / exact.double().norm(dim=-1)
    return found.cpu().numpy()


def bound(prompts: Sequence[Prompt], rows: int, outputs: Sequence[torch.Tensor], lses: Sequence[Any]) -> float:
    """What an audit says of the last ``rows`` rows of all layers: outputs (h, rows, d), log-sums (h, rows) of each."""
    q = torch.stack([prompt.q[:, -rows:] for prompt in prompts])
    k, v = (torch.stack([getattr(prompt, name) for prompt in prompts]) for name in "kv")
    output = torch.stack([part.to(q) for part in outputs])
    lse = torch.stack([torch.as_tensor(part).double().to(q.device) for part in lses])
    unknown: Any = torch.full_like(lse, torch.inf) if CUDA else np.full(lse.shape, np.inf)
    sums: Any = lse if CUDA else lse.numpy()
    nothing = unknown == 0
    given = Result(output, sums, nothing, Certificate("none", *[unknown] * 4), Counters(*[nothing] * 3), k.shape[2])
    return audit(q, k, v, given, rows=min(AUDITED, rows)).error.overall_upper

"""The dispatch table: which module serves which operation, and why one does not.

Methods of the index are rows of the operation ``build``; a method asked for by name is served or refused, never
replaced. The choice is made once, when an index or a session is made.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hsr.errors import ArgumentError, BackendUnavailable


@dataclass(frozen=True)
class Row:
    """One implementation of one operation."""

    op: str
    method: str
    module: str
    device: str  # "cpu", "cuda" or "any"
    serves: str  # what it is for, in a few words; the README's table shows it, and the next
    work: str  # of a query over n keys of which it reports k: what is proven and what was measured
    needs: tuple[str, ...] = ()

    def refusal(self, device: str, **call: object) -> str | None:
        """Why this row cannot serve the call; None if it can."""
        if self.device not in ("any", device):
            return f"runs on {self.device}, the arrays are on {device}"
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"needs the package {package}, which is not installed"
        module = importlib.import_module(self.module)
        return module.refuses(device=device, **call) if hasattr(module, "refuses") else None

    def function(self) -> Callable[..., Any]:
        """The function that serves the operation; it is named like the operation."""
        return getattr(importlib.import_module(self.module), self.op)


ROWS = (
    Row("build", "reference", "hsr.reference", "cpu", "the definition, plain float64 numpy", "n keys"),
    Row("build", "brute", "hsr.brute_numba", "cpu", "few keys; scores every one", "n keys"),
    Row(
        "build",
        "tree",
        "hsr.tree_numba",
        "cpu",
        "small d (2 to about 8); box bounds, whole subtrees at once",
        "proven O(n); measured n^0.07 (d = 2), n^0.10 (3), n^0.20 (4), n^0.41 (8), n (64)",
    ),
    Row(
        "build",
        "layers",
        "hsr.layers_numba",
        "cpu",
        "the plane (d = 2); convex layers",
        "O(log n + k) up to the hints' ranges; measured n^0.00",
    ),
    Row(
        "build",
        "sketch",
        "hsr.sketch_numba",
        "cpu",
        "attention's d (16 to 256); int8 codes with a proven bound",
        "n codes, then 1.1 k to 2.8 k keys",
    ),
    Row("attend", "numba", "attention.attend_numba", "cpu", "weighted values over reported keys", "k keys"),
    Row("attend", "reference", "attention.reference", "cpu", "the definition, plain float64 numpy", "k keys"),
    Row(
        "listed",
        "numba",
        "attention.listed_numba",
        "cpu",
        "a prompt's rows over lists that blocks of 128 rows share",
        "k keys a block",
    ),
    Row(
        "listed",
        "reference",
        "attention.listed_reference",
        "cpu",
        "the definition, plain float64 numpy",
        "k keys a row",
    ),
    Row(
        "skip_softmax",
        "numba",
        "attention.skip_softmax_numba",
        "cpu",
        "a prompt's rows over all keys, but blocks of small weight",
        "n keys scored, those of k not skipped weighed",
    ),
    Row(
        "skip_softmax",
        "reference",
        "attention.skip_softmax_reference",
        "cpu",
        "the definition, plain float64 numpy",
        "n keys scored, those of k not skipped weighed",
    ),
    Row(
        "key_lists",
        "numba",
        "attention.block_sampled_numba",
        "cpu",
        "drawing those lists by importance",
        "n keys for each of a few rows a block",
    ),
    Row(
        "key_lists",
        "reference",
        "attention.listed_reference",
        "cpu",
        "the definition, plain float64 numpy",
        "n keys for each of a few rows a block",
    ),
    Row(
        "chosen",
        "numba",
        "attention.chosen_numba",
        "cpu",
        "a decode step over the keys that a selector lists",
        "k keys",
        ("torch",),
    ),
    Row(
        "chosen",
        "reference",
        "attention.chosen_reference",
        "cpu",
        "the definition, plain float64 numpy",
        "k keys",
        ("torch",),
    ),
    Row(
        "chosen",
        "triton",
        "gpu.chosen",
        "cuda",
        "a decode step over the keys that a selector lists; counts stay on the GPU",
        "k keys",
        ("torch", "triton"),
    ),
    Row(
        "index",
        "int8",
        "gpu.index",
        "cuda",
        "exact reporting where the keys lie on a GPU; int8 codes with a proven bound",
        "n codes, then the keys that their bound lets pass",
        ("torch", "triton"),
    ),
    Row(
        "prompt",
        "cuda",
        "gpu.prompt",
        "cuda",
        "prompts whose row blocks share sampled keys (CUDA C++ on Hopper for d 64 and 128, Triton elsewhere)",
        "n keys for each of a few rows a block, then k keys a block",
        ("torch", "triton"),
    ),
    Row(
        "prompt",
        "skip",
        "gpu.skip_softmax",
        "cuda",
        "prompts whose key blocks of small weight are skipped (Triton)",
        "n keys scored, those of k not skipped weighed",
        ("torch", "triton"),
    ),
    Row(
        "audited",
        "cuda",
        "gpu.audited",
        "cuda",
        "exact attention on some rows of a prompt, and the bounds that it gives",
        "n keys a row",
        ("torch", "triton"),
    ),
    Row(
        "session",
        "cuda",
        "gpu.session",
        "cuda",
        "sampled decode in one launch (CUDA C++) or four (Triton)",
        "n codes, k keys",
        ("torch", "triton"),
    ),
    Row(
        "session",
        "relu",
        "gpu.relu",
        "cuda",
        "exact ReLU^alpha decode over reported keys, certified",
        "n codes, k keys",
        ("torch", "triton"),
    ),
    Row(
        "session",
        "selected",
        "attention.selected_session",
        "any",
        "decode over the keys that a selector of a published system lists",
        "the selector's, then k keys",
        ("torch",),
    ),
    Row(
        "kmeans",
        "faiss",
        "gpu.kmeans_faiss",
        "any",
        "clusters of keys, a clustering per head; tensors",
        "k centroids for each of n keys, per iteration",
        ("torch", "faiss"),
    ),
    Row(
        "candidates",
        "faiss-knn",
        "gpu.knn_faiss",
        "any",
        "top-k by float32 scores; batches of queries; tensors",
        "n keys",
        ("torch", "faiss"),
    ),
    Row(
        "candidates",
        "faiss-ivf",
        "gpu.ivf_faiss",
        "any",
        "approximate top-k from inverted lists, nothing guaranteed; tensors",
        "nlist centroids, about n nprobe / nlist keys",
        ("torch", "faiss"),
    ),
)


def methods(op: str) -> tuple[str, ...]:
    """Names of the rows that implement an operation, in order of preference."""
    return tuple(row.method for row in ROWS if row.op == op)


def choose(op: str, method: str, *, device: str = "cpu", **call: object) -> Callable[..., Any]:
    """The function of the row named ``method``.

    Raises:
        ArgumentError: no such row.
        BackendUnavailable: the row cannot serve this call; the message has its reason.
    """
    row = named(op, method)
    reason = row.refusal(device, **call)
    if reason is not None:
        raise BackendUnavailable(f"method {method!r} cannot serve this call: it {reason}")
    return row.function()


def preferred(op: str, *, device: str, **call: object) -> Callable[..., Any]:
    """The function of the first row, in order of preference, that serves the call.

    Raises:
        BackendUnavailable: none does; the message has the reason of each.
    """
    reasons = []
    for row in ROWS:
        if row.op == op:
            reason = row.refusal(device, **call)
            if reason is None:
                return row.function()
            reasons.append(f"{row.method!r} {reason}")
    raise BackendUnavailable(f"no {op} serves this call: " + "; ".join(reasons))


def named(op: str, method: str) -> Row:
    """The row of that name; ArgumentError if there is none."""
    for row in ROWS:
        if (row.op, row.method) == (op, method):
            return row
    raise ArgumentError(f"method must be one of {', '.join(methods(op))}; got {method!r}")

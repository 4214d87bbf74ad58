"""Histograms of codes, kind and unkind, of the blocks of a prompt: what thresholds are chosen from."""

from __future__ import annotations

import numpy as np

from attention.listed_reference import CODES

KINDS = ("any", "constant", "top", "alternating", "rising", "falling", "jumps", "late", "last", "first")


def made(rng: np.random.Generator, kind: str, edge: np.ndarray) -> np.ndarray:
    """(T, 256) int64, line I of edge_I keys: of any codes, or all of one that the kind tells."""
    T = len(edge)
    one = {
        "constant": np.full(T, 119),
        "top": np.full(T, CODES - 1),
        "alternating": np.where(np.arange(T) % 2, 10, 200),
        "rising": np.arange(T) * (CODES - 1) // T,
        "falling": CODES - 1 - np.arange(T) * (CODES - 1) // T,
        "jumps": rng.integers(0, CODES, T),
        "last": np.where(np.arange(T) == T - 1, CODES - 1, 0),  # the last block has all that matters
        "first": np.where(np.arange(T) < 3, CODES - 1, 0),
    }
    found = np.zeros((T, CODES), np.int64)
    for line, keys in enumerate(edge):
        if kind in one:
            found[line, one[kind][line]] = keys
        elif kind == "late" and line < T // 2:  # nothing of importance yet
            found[line, 0] = keys
        else:
            found[line] = np.bincount(rng.integers(0, CODES, keys), minlength=CODES)
    return found

"""What tests of selectors share: prompts as tensors, lists as sets, attention as the papers write it."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import NamedTuple

import numpy as np
import torch

from attention.key_lists import KeyLists, check, plain, row_blocks
from attention.listed_reference import lines_of
from attention.selector import Selector
from tests.prompts import Prompt, made

SHAPES = ((300, 300), (128, 128), (1, 700), (700, 700), (421, 552), (256, 1024), (650, 1100))  # m, n


class Line(NamedTuple):
    """What a block of rows is shown beside its band."""

    tokens: set[int]
    blocks: set[int]
    means: set[int]


class Place(NamedTuple):
    """Where a block of rows lies: its rows, their positions, and the key block that its first row lies in."""

    rows: np.ndarray
    positions: np.ndarray
    own: int


def gaussian(seed: int, m: int, n: int, g: int = 2, group: int = 2, d: int = 16, sharp: float = 2.0) -> Prompt:
    """Scores with enough spread that something is worth choosing, and sinks."""
    q, k, v = made(np.random.default_rng(seed), m, n, g, group, d, 8, "gaussian")
    k[:, :2] += 0.5 * q.mean(axis=(0, 1)) * n**0.5
    return Prompt(q * sharp, k, v)


def lists_of(selector: Selector, prompt: Prompt) -> KeyLists:
    lists = selector.lists(torch.from_numpy(prompt.q), torch.from_numpy(prompt.k), prompt.scale)
    check(lists, *prompt.shape)
    return lists


def lines(selector: Selector, prompt: Prompt) -> list[Line]:
    """Line by line, head by head."""
    found = plain(lists_of(selector, prompt))
    count = len(prompt.q) * row_blocks(prompt.q.shape[1])
    return [Line(*(set(map(int, ids)) for ids in lines_of(found, line))) for line in range(count)]


def places(m: int, n: int) -> list[Place]:
    rows = [np.arange(first, min(first + 128, m)) for first in range(0, m, 128)]
    return [Place(r, n - m + r, int(n - m + r[0]) // 128) for r in rows]


def wanted(prompt: Prompt, of_head: Callable[[np.ndarray, np.ndarray], list[Line]]) -> list[Line]:
    """The same by a reference: q (m, d), scaled, and k (n, d) of one head -> a line for each block of rows."""
    group = len(prompt.q) // len(prompt.k)
    q = prompt.q.astype(np.float64) * prompt.scale
    return [line for h in range(len(q)) for line in of_head(q[h], prompt.k[h // group].astype(np.float64))]


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf weighs nothing."""
    shares = np.exp(x - x.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def last_attention(q: np.ndarray, k: np.ndarray, rows: int) -> np.ndarray:
    """Causal softmax of the last rows of scaled queries (m, d) -> (rows, n)."""
    n, R = len(k), min(rows, len(q))
    later = np.arange(n) > n - R + np.arange(R)[:, None]
    return softmax(np.where(later, -np.inf, q[-R:] @ k.T))


def by_distance(shares: np.ndarray) -> np.ndarray:
    """Mean attention (R, n) of the last rows, by distance from row to key: (n,)."""
    R, n = shares.shape
    found = np.zeros(n)
    for i in range(R):
        for j in range(n - R + i + 1):
            found[n - R + i - j] += shares[i, j] / R
    return found


def block_means(x: np.ndarray) -> np.ndarray:
    """Of blocks of 128 rows, the last of as many as there are."""
    return np.array([x[i : i + 128].mean(axis=0) for i in range(0, len(x), 128)])


def block_sums(x: np.ndarray) -> np.ndarray:
    return np.array([x[i : i + 128].sum() for i in range(0, len(x), 128)])


def top(mass: np.ndarray, count: int, forced: Set[int] = frozenset()) -> set[int]:
    """The forced entries first, then the largest, ``count`` of them."""
    order = sorted(range(len(mass)), key=lambda i: (i not in forced, -mass[i]))
    return set(order[:count])


def reaching(mass: np.ndarray, share: float, forced: Set[int] = frozenset()) -> set[int]:
    """The forced entries, then the largest until their mass reaches the share of it."""
    kept, total = set(forced), sum(mass[i] for i in forced)
    for i in sorted(set(range(len(mass))) - kept, key=lambda i: -mass[i]):
        if total >= share * mass.sum():
            break
        kept.add(i)
        total += mass[i]
    return kept


def eligible(blocks: set[int], place: Place) -> set[int]:
    return {J for J in blocks if 0 <= J < place.own}

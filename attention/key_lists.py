"""Lists of keys that a block of 128 query rows shares, and the geometry of those blocks.

A prompt's m rows stand at the end of n keys (bottom-right causal): row i has position ``p_i = n - m + i``.  Rows are
cut into T = ceil(m / 128) blocks, keys into blocks of 128 from key 0 on.  Block I of rows attends to its *band*,
exactly: the keys from ``edge_I`` up to each row's own position; the keys before ``edge_I``, whole blocks, may be
listed: they are *eligible*.  Everything about the blocks is plain integers and numpy, for the CPU and the GPU alike.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsr.errors import ArgumentError

ROWS = 128  # rows of a block
KEYS = 128  # keys of a block
SPOKEN, HEARD = 8, 16  # rows whose mean speaks for a part of a block; of a block at least


ARRAYS = ("token_offsets", "tokens", "log_weights", "block_offsets", "blocks", "mean_offsets", "means")


def row_blocks(m: int) -> int:
    """T, how many blocks m rows make."""
    return -(-m // ROWS)


def edges(m: int, n: int) -> np.ndarray:
    """edge_I, the first key of each block's band, a multiple of 128: (T,) int64."""
    return (n - m + ROWS * np.arange(row_blocks(m), dtype=np.int64)) // KEYS * KEYS


def ends(m: int, n: int) -> np.ndarray:
    """n_I, the keys that the last row of each block sees: (T,) int64."""
    return n - m + np.minimum(ROWS * (np.arange(row_blocks(m), dtype=np.int64) + 1), m)


def bands(m: int, n: int) -> np.ndarray:
    """Keys of each block's band, ``n_I - edge_I``, at most 255: (T,) int64."""
    return ends(m, n) - edges(m, n)


def least_density(m: int, n: int) -> float:
    """What the bands alone make: a head's density lies above it, if any of its keys is eligible."""
    return float(bands(m, n).sum() / ends(m, n).sum())


def budget(density: float, m: int, n: int) -> float:
    """Keys that a head's lists may hold together beside the bands: ``density sum_I n_I - sum_I band_I``.

    Raises:
        ArgumentError: it is not positive though keys are eligible.
    """
    kept = float(density) * int(ends(m, n).sum()) - int(bands(m, n).sum())
    if kept <= 0 and edges(m, n)[-1] > 0:
        raise ArgumentError(
            f"density must be above {least_density(m, n):.6g}, what the bands of {m} rows of {n} keys make; "
            f"got {density}"
        )
    return kept


def representatives(m: int, rows: int, causal: bool = False) -> np.ndarray:
    """Where those stand that speak for each block, evenly spaced in it: (T, rows) int64, ``rows`` a divisor of 128.

    Causal: the block's first row and ones before it, so that nothing after any row of the block decides for it.
    """
    first = ROWS * np.arange(row_blocks(m), dtype=np.int64)[:, None]
    step = np.arange(rows, dtype=np.int64)
    if causal:
        return np.maximum(first - step * (ROWS // rows), 0)
    return np.minimum(first + (2 * step + 1) * (ROWS // 2) // rows, m - 1)


def spoken(rows: int) -> int:
    """How many rows each of a block's so many representatives is the mean of."""
    return min(max(SPOKEN, HEARD // rows), ROWS // rows)


def spoken_for(m: int, rows: int, causal: bool = False) -> np.ndarray:
    """The rows whose mean a representative is: (T, rows, `spoken` (rows)) int64.

    Evenly spaced in the representative's part of the block; causal: from where it stands back.
    """
    part, s = ROWS // rows, spoken(rows)
    first = ROWS * np.arange(row_blocks(m), dtype=np.int64)[:, None, None]
    begin, step = part * np.arange(rows, dtype=np.int64)[:, None], np.arange(s, dtype=np.int64)
    if causal:
        return np.maximum(first - begin - step * (part // s), 0)
    return np.minimum(first + begin + (2 * step + 1) * part // (2 * s), m - 1)


@dataclass(frozen=True)
class KeyLists:
    """The keys of H T lines, line = head * T + I, in CSR form: numpy arrays or torch tensors, on any device.

    Line l of tokens is ``tokens[token_offsets[l]:token_offsets[l + 1]]``, in any order, likewise of blocks and means.
    Arrays may be longer than the last offset says; the rest is never read.  Only eligible keys may be listed, and a key
    by one of the three kinds only: `check` sees to it, attention does not look.

    A row attends to softmax over its line's keys, log weights added to their scaled scores, and over its band.

    Attributes:
        token_offsets: (H T + 1,) int64.
        tokens: int32, single keys.
        log_weights: float32, natural logarithms, one per token; None for zeros.
        block_offsets: (H T + 1,) int64; None where no line has blocks.
        blocks: int32, key blocks attended to whole; None likewise.
        mean_offsets: (H T + 1,) int64; None where no line has means.
        means: int32, key blocks for which mean key and mean value stand, with log weight ln 128; None likewise.
        rows: rows of a block; 128.
        keys: keys of a block; 128.
    """

    token_offsets: Any
    tokens: Any
    log_weights: Any = None
    block_offsets: Any = None
    blocks: Any = None
    mean_offsets: Any = None
    means: Any = None
    rows: int = ROWS
    keys: int = KEYS

    @property
    def lines(self) -> int:
        """H T."""
        return len(self.token_offsets) - 1

    def densities(self, m: int, n: int) -> Any:
        """Share of the keys that a block's last row sees which its rows attend to, over blocks: (H,) float64.

        ``sum_I (tokens_I + 128 blocks_I + means_I + band_I) / sum_I n_I``; of the arrays' own type, on their device,
        which is not waited for.
        """
        per = row_blocks(m)
        listed: Any = 0
        for offsets, size in ((self.token_offsets, 1), (self.block_offsets, self.keys), (self.mean_offsets, 1)):
            if offsets is not None:
                listed = listed + size * (offsets[per::per] - offsets[:-per:per])
        listed = listed.double() if hasattr(listed, "double") else listed  # else a tensor's sums would be float32
        return (listed + float(bands(m, n).sum())) / float(ends(m, n).sum())


def counts(lists: KeyLists) -> np.ndarray:
    """Keys on every line of numpy lists, a mean counting as one: (H T,) int64."""
    kinds = ((lists.token_offsets, 1), (lists.block_offsets, lists.keys), (lists.mean_offsets, 1))
    return np.sum([size * np.diff(offsets) for offsets, size in kinds if offsets is not None], axis=0)


def plain(lists: KeyLists) -> KeyLists:
    """The same in contiguous numpy arrays, whatever they are."""
    given = {name: getattr(lists, name) for name in ARRAYS if getattr(lists, name) is not None}
    arrays: dict[str, Any] = {name: np.ascontiguousarray(_on_cpu(x)) for name, x in given.items()}
    return dataclasses.replace(lists, **arrays)


def check(lists: KeyLists, heads: int, m: int, n: int) -> None:
    """Whether lists that anyone may have made can be attended to by (heads, m) rows of n keys; waits for their device.

    Raises:
        ArgumentError: arrays of a wrong kind, length or dtype; offsets that do not rise from 0; a key out of range, not
            eligible or listed twice; a log weight that is not finite.
    """
    if (lists.rows, lists.keys) != (ROWS, KEYS):
        raise ArgumentError(f"lists must have blocks of {ROWS} rows and {KEYS} keys; got {lists.rows} and {lists.keys}")
    first = edges(m, n)
    limits = np.tile(first, heads)  # (H T,)
    token_lines, tokens = _listed(lists, "token_offsets", "tokens", limits)
    block_lines, blocks = _listed(lists, "block_offsets", "blocks", limits // KEYS)
    mean_lines, means = _listed(lists, "mean_offsets", "means", limits // KEYS)
    if lists.log_weights is not None:
        weights = _array("log_weights", lists.log_weights, np.float32)
        if len(weights) < len(tokens):
            raise ArgumentError(f"log_weights must have {len(tokens)} entries, one per token; got {len(weights)}")
        if not np.isfinite(weights[: len(tokens)]).all():
            where = int(np.flatnonzero(~np.isfinite(weights[: len(tokens)]))[0])
            raise ArgumentError(f"log_weights must be finite; got {weights[where]} at {where}")
    width = n // KEYS + 1
    _once("tokens", token_lines * n + tokens, token_lines, tokens)
    whole = np.concatenate([block_lines * width + blocks, mean_lines * width + means])
    _once("blocks and means", whole, np.concatenate([block_lines, mean_lines]), np.concatenate([blocks, means]))
    twice = np.isin(token_lines * width + tokens // KEYS, whole)
    if twice.any():
        found = np.flatnonzero(twice)[0]
        raise ArgumentError(
            f"tokens must not lie in a block or mean of their line; got token {tokens[found]} on line "
            f"{token_lines[found]}"
        )


def _listed(lists: KeyLists, name: str, ids_name: str, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Line and id of every entry of a kind, both int64, ids below the limits (lines,) of their lines."""
    given, ids_given = getattr(lists, name), getattr(lists, ids_name)
    if given is None and ids_given is None and name != "token_offsets":
        return np.empty(0, np.int64), np.empty(0, np.int64)
    offsets, ids = _array(name, given, np.int64), _array(ids_name, ids_given, np.int32)
    if len(offsets) != len(limits) + 1:
        raise ArgumentError(
            f"{name} must have {len(limits) + 1} entries, one per line and one more; got {len(offsets)}"
        )
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(ids):
        raise ArgumentError(
            f"{name} must rise from 0 to at most {len(ids)}, the entries of {ids_name}; got {offsets[0]}..{offsets[-1]}"
            + (", falling between" if (np.diff(offsets) < 0).any() else "")
        )
    ids = ids[: offsets[-1]].astype(np.int64)
    lines = np.repeat(np.arange(len(limits)), np.diff(offsets))
    strange = (ids < 0) | (ids >= limits[lines])
    if strange.any():
        found = np.flatnonzero(strange)[0]
        line = lines[found]
        raise ArgumentError(
            f"{ids_name} must lie in 0..{limits[line] - 1} on line {line}, whose others are not eligible; "
            f"got {ids[found]}"
        )
    return lines, ids


def _array(name: str, given: Any, dtype: Any) -> np.ndarray:
    """A numpy array (t,) of the dtype, of an array or a tensor on any device."""
    array = _on_cpu(given)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        wanted = np.dtype(dtype).name
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else repr(given)
        raise ArgumentError(f"{name} must be an array or tensor (entries,) of {wanted}; got {found}")
    return array


def _on_cpu(array: Any) -> Any:
    """A tensor as numpy; anything else as it is."""
    return array.detach().cpu().numpy() if hasattr(array, "detach") else array


def _once(name: str, places: np.ndarray, lines: np.ndarray, ids: np.ndarray) -> None:
    order = np.argsort(places, kind="stable")
    again = np.flatnonzero(places[order][1:] == places[order][:-1])
    if again.size:
        found = order[again[0] + 1]
        raise ArgumentError(f"{name} must name each key once on a line; got {ids[found]} twice on line {lines[found]}")

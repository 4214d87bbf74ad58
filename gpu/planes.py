"""A `hsr.coder.Coder` in the layout that the kernels read: rows of bytes, cut into planes.

A key's code is one row of 16 to 128 bytes: first a column per pair of 4-bit axes, then a column per four 2-bit axes.
The kernels see R columns, a power of two from 32 on; those beyond a row are empty.  *Plane* p holds, for every column,
the bits from ``SHIFTS[p]`` on: two planes where all columns are nibbles, four otherwise.  A query has one int8 row per
plane, zero where a column has no axis in it, so that the sum of the planes' integer products with the masked and
shifted bytes is the sum over the axes.

Keys are widened by the lift of `hsr.lifted`, which is one more coordinate, so maps have d + 1 rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from gpu.fit import fit
from hsr.coder import EVERY, Coder
from hsr.errors import ArgumentError

SHIFTS = (0, 4, 2, 6)  # nibble columns use the first two
ROWS = (16, 24, 32, 48, 64, 96, 128)  # bytes that a row of codes may have
WIDTHS = (4, 2)  # bits of a code that the kernels know
GRAIN = {8: 1, 4: 4, 2: 2, 1: 1}  # words of a width come in so many: whole products of 16 keys by 32 axes


@dataclass(frozen=True)
class DevicePlanes:
    """The arrays of `Planes` on a device, float32."""

    query_map: torch.Tensor
    key_map: torch.Tensor
    mean: torch.Tensor
    half: torch.Tensor
    top: torch.Tensor
    order: torch.Tensor  # (axes,) int64: columns of nibbles, plane by plane, then those of 2-bit codes; none is empty

    def axes(self, columns: torch.Tensor) -> torch.Tensor:
        """(..., P, R) by plane and column -> (..., axes) in `order`."""
        return columns.flatten(-2).index_select(-1, self.order)

    @cached_property
    def by_axis(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps of queries and of keys (g, d + 1, axes), half and top (axes,), as `gpu.step` reads them."""
        return (
            self.axes(self.query_map.transpose(1, 2)), self.axes(self.key_map.transpose(1, 2)),
            self.axes(self.half), self.axes(self.top),
        )  # fmt: skip


@dataclass(frozen=True)
class Planes:
    """Maps of g heads, float32, columns in the kernels' order.

    ``z[p] = q query_map[p, :d] + query_map[p, d]`` is a query in plane p, in units of one code step and base-2 scores;
    ``floor((k - mean) key_map[p, :d] + (lift - mean_lift) key_map[p, d]) + half[p]``, clipped to 0 .. top[p], a key.
    """

    row: int  # bytes of a key's code
    nibbles: int  # columns of 4-bit codes
    query_map: np.ndarray  # (g, P, d + 1, R)
    key_map: np.ndarray  # (g, P, d + 1, R)
    mean: np.ndarray  # (g, d + 1); the last one in units of scaled scores' nats over the scale
    half: np.ndarray  # (P, R): levels / 2, 0 without an axis
    top: np.ndarray  # (P, R): levels - 1, 0 without an axis
    _placed: dict[torch.device, DevicePlanes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> DevicePlanes:
        """The same on a device, copied there at the first call: a cache of the same codes then waits for no copy."""
        if device not in self._placed:
            columns = np.arange(self.half.size).reshape(self.half.shape)
            order = np.concatenate([columns[:2, : self.nibbles].ravel(), columns[:, self.nibbles : self.row].ravel()])
            parts = self.query_map, self.key_map, self.mean, self.half, self.top, order
            self._placed[device] = DevicePlanes(*(torch.from_numpy(part).to(device) for part in parts))
        return self._placed[device]

    @property
    def count(self) -> int:
        """P, the number of planes."""
        return self.half.shape[0]

    @property
    def columns(self) -> int:
        """R, the columns of a plane."""
        return self.half.shape[1]


def fitted(
    keys: torch.Tensor,
    lift: torch.Tensor,
    scale: float,
    row: int,
    queries: torch.Tensor | None,
    widths: tuple[int, ...] = WIDTHS,
) -> Planes:
    """Fit a coder to a sample, where that lies, and lay it out.

    Args:
        keys: (g, n, d) float32 or float64.
        lift: (g, n), in nats, as for `hsr.lifted.Lifted`.
        scale: of the scores.
        row: bytes per key, one of ROWS.
        queries: (g, m, d) like those to come, or None.
        widths: bits that a code may have, some of WIDTHS.

    Raises:
        ArgumentError: a row that the kernels have no form for.
    """
    if not widths or not set(widths) <= set(WIDTHS):
        raise ArgumentError(f"widths must be some of {WIDTHS} on cuda; got {widths}")
    if row not in ROWS:
        raise ArgumentError(f"bytes_per_key must be one of {', '.join(map(str, ROWS))} on cuda; got {row}")
    lifted = torch.cat([keys, lift[..., None] / scale], 2)
    known = None if queries is None else torch.nn.functional.pad(queries, (0, 1), value=1.0)
    grain = GRAIN if 2 in widths or row % 16 == 0 else EVERY  # else `gpu.step` has no form
    return planes_of(fit(lifted, row, known, widths, grain), scale)


def planes_of(coder: Coder, scale: float) -> Planes:
    """The planes of a coder of 4-bit and 2-bit words, for keys whose last coordinate is the lift."""
    _, fours, twos, _ = coder.layout.words
    g, wide = coder.mean.shape
    row, nibbles = 4 * (fours + twos), 4 * fours
    count, columns = 4 if twos else 2, max(32, 1 << (row - 1).bit_length())
    axis = np.full((count, columns), -1)  # (P, R): which axis lies there
    axis[:2, :nibbles] = np.arange(2 * nibbles).reshape(2, nibbles)
    if twos:
        axis[:, nibbles:row] = 2 * nibbles + np.arange(4 * (row - nibbles)).reshape(4, -1)
    axis[axis >= wide] = -1  # padding
    real = axis >= 0
    levels = np.where(np.arange(columns) < nibbles, 16, 4)[None] * real
    steps = np.where(real, coder.steps[:, np.maximum(axis, 0)], 0.0)  # (g, P, R)
    inverse = np.divide(1.0, steps, out=np.zeros_like(steps), where=steps > 0)
    chosen = np.maximum(axis, 0).ravel()
    query_map = coder.query_map[:, :, chosen].reshape(g, wide, count, columns).swapaxes(1, 2) * steps[:, :, None]
    key_map = coder.key_map[:, :, chosen].reshape(g, wide, count, columns).swapaxes(1, 2) * inverse[:, :, None]
    return Planes(
        row,
        nibbles,
        np.ascontiguousarray(query_map * (scale / math.log(2)), np.float32),
        np.ascontiguousarray(key_map, np.float32),
        np.ascontiguousarray(coder.mean, np.float32),
        (levels // 2).astype(np.float32),
        np.maximum(levels - 1, 0).astype(np.float32),
    )

"""ReLU^alpha decode on a GPU: exact attention over the keys of a half-space, certified as on the CPU.

Algorithm 2 of arXiv 2410.10165 with the weight of Definition 1.2.  `gpu.half_space` lists each row's candidates;
`accumulate` scores them in float64 and sums weights and weighted values, a list cut into parts; `merge` joins the parts
and bounds the error.  Everything is float64 after the codes, so that the bounds are those of `attention.result.certify`
with a few roundings more.  Launches, shapes and memory depend on the cache's length alone and the host reads nothing:
`attend` may be captured in a CUDA graph once it has run eagerly, and a replay attends to the tokens of the capture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from attention.engine import Plan, fold
from attention.result import ROUNDING, SMALLEST, Certificate, Counters, Result
from attention.weights import ReLUPower
from gpu import half_space, tensors
from gpu.index import WIDEST, CudaIndex
from hsr import checks
from hsr.errors import ArgumentError

LOWEST = tl.constexpr(-1000)  # power of two of a part without weight
UNIT = tl.constexpr(2.0**-53)
LN2 = tl.constexpr(0.6931471805599453)
RESIDENT = 4  # programs per multiprocessor that a step is cut into
WORK = 2048  # entries of keys or values that a program holds at once
PARTS = 4096  # entries of partial outputs that `merge` holds at once
LISTS = 1 << 27  # candidates that one scan has room for, unless one row needs more
STEEPEST = 2.0**700  # scale up to which scores of float32 inputs are within float64


def refuses(*, plan: Plan, **call: object) -> str | None:
    """Why the kernels cannot serve the plan; None if they can."""
    return None if isinstance(plan.weight, ReLUPower) else "serves the weight ReLUPower(alpha, b) alone"


@triton.jit
def exponent(x):
    """x float64, zero or more -> int64 e with x < 2**e, as small as can be but -1022."""
    return ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022


@triton.jit
def power_of_two(e):
    """2**e as float64: at least 2**-1022, infinite from e = 1024 on."""
    return (tl.minimum(tl.maximum(e.to(tl.int64), -1022), 1024) + 1023 << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["rows", "tiles", "splits", "alpha"])
def accumulate(
    Q, K, V, IDS, STARTS, SETTINGS, LARGEST, TOTALS, VECTORS, POWERS, room, rows, tiles, splits, alpha,
    D: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, RV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Part of a row's candidates; grid (heads * rows * splits,), the parts cut evenly from the list's length.

    Q (heads * rows, D), K (heads, room, D), V (heads, room, DV); IDS int32 and STARTS as `gpu.half_space.expand` has
    them; SETTINGS (2,) float64: scale and b; LARGEST () float64 -> per row and part TOTALS (4,) float64: the weights'
    sum, that of ``(max(s - b, 0) + error)**(alpha - 1)``, how many keys may have weight, and the bound ``error`` on a
    score's rounding; VECTORS (DV,) float64: weighted values; POWERS (2,) int64, p and p'.  The first sum and the vector
    are in units of ``2**(alpha p)``, the second in units of ``2**((alpha - 1) p')``, so that no power overflows.
    """
    i = tl.program_id(0)
    row = (i // splits).to(tl.int64)
    part = i % splits
    head = row // rows
    r = tl.arange(0, R)
    c = tl.arange(0, RV)
    scale = tl.load(SETTINGS)
    offset = tl.load(SETTINGS + 1)
    q = tl.load(Q + row * D + r, mask=r < D, other=0.0).to(tl.float32).to(tl.float64)
    error = tl.sum(tl.abs(q), 0) * tl.load(LARGEST) * scale * ((D + 4) * 2.0**-52)
    begin = tl.load(STARTS + row * tiles)
    end = tl.load(STARTS + (row + 1) * tiles)
    per = tl.cdiv(tl.cdiv(end - begin, splits), C) * C
    first = begin + part * per
    last = tl.minimum(first + per, end)
    power = tl.full((), LOWEST, tl.int64)
    steeper = tl.full((), LOWEST, tl.int64)
    total = tl.zeros((C,), tl.float64)
    steep = tl.zeros((C,), tl.float64)
    count = tl.zeros((C,), tl.float64)
    vector = tl.zeros((C, RV), tl.float64)
    for at in range(first, last, C):
        o = at + tl.arange(0, C)
        ok = o < last
        key = head * room + tl.load(IDS + o, mask=ok, other=0)
        seen = ok[:, None] & (r[None, :] < D)
        k = tl.load(K + key[:, None] * D + r[None, :], mask=seen, other=0.0).to(tl.float32).to(tl.float64)
        raw = tl.sum(k * q[None, :], 1) * scale - offset + (error - error)  # NaN for a query that is not finite
        above = tl.where(ok, tl.where(raw <= 0, 0.0, raw), 0.0)  # NaN stays
        some = ok & (raw + error >= 0)
        top = tl.max(above, 0)
        higher = tl.maximum(power, exponent(top))
        edge = tl.maximum(steeper, exponent(top + error))
        base = above * power_of_two(-higher)
        slope = (above + error) * power_of_two(-edge)
        weight = base
        growth = tl.full((C,), 1.0, tl.float64)
        for _ in range(1, alpha):
            weight = weight * base
            growth = growth * slope
        fade = power_of_two((power - higher) * alpha)
        m = (weight != 0)[:, None] & (c[None, :] < DV)
        v = tl.load(V + key[:, None] * DV + c[None, :], mask=m, other=0.0).to(tl.float32).to(tl.float64)
        vector = vector * fade + weight[:, None] * v
        total = total * fade + weight
        steep = steep * power_of_two((steeper - edge) * (alpha - 1)) + tl.where(some, growth, 0.0)
        count += tl.where(some, 1.0, 0.0)
        power = higher
        steeper = edge
    out = row * splits + part
    tl.store(TOTALS + out * 4, tl.sum(total, 0))
    tl.store(TOTALS + out * 4 + 1, tl.sum(steep, 0))
    tl.store(TOTALS + out * 4 + 2, tl.sum(count, 0))
    tl.store(TOTALS + out * 4 + 3, error)
    tl.store(VECTORS + out * DV + c, tl.sum(vector, 0), mask=c < DV)
    tl.store(POWERS + out * 2, power)
    tl.store(POWERS + out * 2 + 1, steeper)


@triton.jit(do_not_specialize=["rows", "splits", "alpha"])
def merge(
    TOTALS, VECTORS, POWERS, MEANS, RADIUS, CAST, OUTPUT, FACTS, REPORTED, rows, every, splits, alpha,
    DV: tl.constexpr, RV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Parts of `accumulate` -> a row's output and what is known of its error; grid (heads * rows,).

    MEANS (heads, DV), RADIUS (heads,) float64: a ball that holds the values; CAST (2,) float64: the output's relative
    and absolute rounding -> OUTPUT (heads * rows, DV); FACTS (4, every) float64: log-sum, and the bounds on the
    output's error, the relative one and the log-sum's; REPORTED (heads * rows,) int64.  See `attention.result.certify`.
    """
    row = tl.program_id(0).to(tl.int64)
    head = row // rows
    p = tl.arange(0, SPLITS)
    c = tl.arange(0, RV)
    real = p < splits
    at = row * splits + p
    power = tl.load(POWERS + at * 2, mask=real, other=LOWEST)
    steeper = tl.load(POWERS + at * 2 + 1, mask=real, other=LOWEST)
    highest = tl.max(power, 0)
    edge = tl.max(steeper, 0)
    fade = power_of_two((power - highest) * alpha)
    total = tl.sum(tl.load(TOTALS + at * 4, mask=real, other=0.0) * fade, 0)
    rise = power_of_two((steeper - edge) * (alpha - 1))
    steep = tl.sum(tl.load(TOTALS + at * 4 + 1, mask=real, other=0.0) * rise, 0)
    count = tl.sum(tl.load(TOTALS + at * 4 + 2, mask=real, other=0.0), 0)
    error = tl.load(TOTALS + row * splits * 4 + 3)
    m = real[:, None] & (c[None, :] < DV)
    parts = tl.load(VECTORS + at[:, None] * DV + c[None, :], mask=m, other=0.0) * fade[:, None]
    empty = total == 0
    whole = tl.where(empty, 1.0, total)
    output = tl.where(empty, 0.0, tl.sum(parts, 0) / whole)
    lse = tl.where(empty, -float("inf"), tl.log(whole) + (highest * alpha).to(tl.float64) * LN2)
    slope = steep * alpha / whole * power_of_two(edge * (alpha - 1) - highest * alpha)
    moved = tl.where(empty, tl.where(count > 0, 1.0, 0.0), tl.minimum(2 * error * slope, 1.0))
    middle = tl.load(MEANS + head * DV + c, mask=c < DV, other=0.0)
    radius = tl.load(RADIUS + head)
    size = tl.sqrt(tl.sum(output * output, 0))
    reach = (tl.sqrt(tl.sum((output - middle) * (output - middle), 0)) + radius) * (1 + 1e-12)
    reach = tl.where(moved >= 1, tl.maximum(reach, size), reach)  # the exact row may be empty, its output zero
    farthest = tl.sqrt(tl.sum(middle * middle, 0)) + radius
    rounding = 2 * (count + 16 + 4 * alpha) * UNIT
    casting = tl.load(CAST) * size + tl.load(CAST + 1)
    nothing = empty & (count == 0)
    off = tl.where(nothing, 0.0, moved * reach + rounding * farthest + casting)
    left = size - off
    relative = tl.where(off == 0, 0.0, tl.where(left > 0, off / tl.where(left > 0, left, 1.0), float("inf")))
    least = tl.where(moved < 1, moved / tl.where(moved < 1, 1 - moved, 1.0), float("inf"))  # at least -log(1 - moved)
    shift = tl.where(nothing, 0.0, least + 2 * rounding + 4 * UNIT * tl.abs(lse))
    tl.store(OUTPUT + row * DV + c, output.to(tl.float32).to(OUTPUT.dtype.element_ty), mask=c < DV)
    tl.store(FACTS + row, lse)
    tl.store(FACTS + every + row, off)
    tl.store(FACTS + 2 * every + row, relative)
    tl.store(FACTS + 3 * every + row, shift)
    tl.store(REPORTED + row, count.to(tl.int64))


class ReluSession:
    """See `attention.DecodeSession`; k (g, n, d), v (g, n, dv), or with a leading B, on one GPU; d and dv up to 512.

    Results stay on the GPU.  Queries are not read by the host: NaN or infinity in them gives NaN.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> None:
        assert isinstance(plan.weight, ReLUPower)
        self._weight, self._device = plan.weight, k.device
        if k.ndim not in (3, 4) or 0 in k.shape:
            raise ArgumentError(f"k must be (g, n, d) or (B, g, n, d), none of them 0; got shape {tuple(k.shape)}")
        self._leading = tuple(k.shape[:-2])
        values = self._like("v", v, k, checks.dtype_name("k", k))
        if not 1 <= v.shape[-1] <= WIDEST:
            raise ArgumentError(f"v must have width 1..{WIDEST} on {k.device.type}; got shape {tuple(v.shape)}")
        self._index = CudaIndex(fold("k", k))
        self._scale = 1 / math.sqrt(k.shape[-1]) if plan.scale is None else float(plan.scale)
        self._half_space = self._weight.half_space(self._scale) if self._scale < STEEPEST else math.nan
        if not math.isfinite(self._half_space):
            raise ArgumentError(f"scale must keep scores and b / scale within float64; got {self._scale}")
        self._settings = torch.tensor([self._scale, self._weight.b], dtype=torch.float64, device=k.device)
        self._centre = values.mean(1, dtype=torch.float64)  # (g, dv)
        self._radius = self._reach(values)  # (g,)
        self._values = values.new_zeros(*values.shape[:1], 0, values.shape[2])
        self._hold(values, 0)
        dtype = self._index.dtype
        cast = [ROUNDING[dtype] * (1 + 1e-6) + 2.0**-23, SMALLEST[dtype] * math.sqrt(v.shape[-1])]  # two roundings
        self._cast = torch.tensor(cast, dtype=torch.float64, device=k.device)

    @property
    def n(self) -> int:
        """Tokens ever added."""
        return self._index.n

    @property
    def alive(self) -> int:
        """How many of them were not evicted."""
        return self._index.alive

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens: k (g, t, d), v (g, t, dv), or with a leading B; if either is refused, neither is added."""
        if tuple(getattr(k, "shape", ()))[:-2] != self._leading:
            raise ArgumentError(f"k must be {(*self._leading, 't', self._index.d)}; got {tuple(k.shape)}")
        values = self._like("v", v, k, self._index.dtype)
        if values.shape[2] != self._values.shape[2]:
            raise ArgumentError(f"v must have width {self._values.shape[2]}; got shape {tuple(v.shape)}")
        before = self.n
        self._index.append(fold("k", k))
        self._radius = torch.maximum(self._radius, self._reach(values))
        self._hold(values, before)

    def evict(self, ids: Any) -> None:
        """Forget tokens, in every head and batch; see `attention.DecodeSession.evict`."""
        self._index.delete(ids)

    def attend(self, q: Any) -> Result:
        """Attention of q (h, m, d) or (B, h, m, d) over every token not evicted."""
        codes = self._index.codes
        came = f"{q.dtype} on {q.device}" if isinstance(q, torch.Tensor) else type(q).__name__
        if came != f"{codes.keys.dtype} on {self._device}":
            raise ArgumentError(f"q must be a tensor of {codes.keys.dtype} on {self._device}; got {came}")
        lead = tuple(q.shape[:-1])
        if q.ndim != len(self._leading) + 2 or lead[:-2] != self._leading[:-1] or q.shape[-1] != codes.d:
            wanted = f"{(*self._leading[:-1], 'h', 'm', codes.d)}"
            raise ArgumentError(f"q must be {wanted} to match the cache; got shape {tuple(q.shape)}")
        checks.grouped("q", lead[-2], self._leading[-1])
        heads, dv = len(codes.keys), self._values.shape[2]
        rows = q.detach().contiguous().reshape(heads, math.prod(lead) // heads, codes.d)
        step = max(1, LISTS // (heads * max(self.n, 1)))
        parts = [self._block(rows[:, a : a + step].contiguous()) for a in range(0, rows.shape[1], step)]
        if not parts:
            parts = [self._nothing(heads)]
        outputs, *others = zip(*parts, strict=True)
        output = torch.cat(outputs, 1)
        facts, reported, scanned = (torch.cat(part, -1) for part in others)
        lse, off, relative, shift = (fact.reshape(lead) for fact in facts)
        empty: Any = torch.isneginf(lse)
        bounds: Any = torch.zeros_like(lse), off, relative, shift  # tensors where a CPU's result has arrays
        work: Any = scanned.reshape(lead), torch.full_like(scanned, self.n).reshape(lead), reported.reshape(lead)
        return Result(
            output.reshape(*lead, dv), lse, empty, Certificate("exact", *bounds), Counters(*work), self._index.alive
        )

    def _block(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """rows (g, m, d) -> output (g, m, dv), facts (4, g, m), reported and scanned (g, m)."""
        codes, alpha = self._index.codes, self._weight.alpha
        (heads, many, d), dv = rows.shape, self._values.shape[2]
        every = heads * many
        bounds = torch.full((heads, many), self._half_space, dtype=torch.float64, device=self._device)
        limits = torch.full((heads, many), self.n, dtype=torch.int32, device=self._device)
        found = half_space.marked(codes, rows, bounds, limits)
        listed = torch.empty(every * self.n, dtype=torch.int32, device=self._device)
        found.listed(listed)
        columns, width = half_space.padded(d), half_space.padded(dv)
        splits = _splits(self._device, every, PARTS // width)

        def new(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=self._device)

        totals, vectors, powers = (
            new(every, splits, 4),
            new(every, splits, dv),
            new(every, splits, 2, dtype=torch.int64),
        )
        accumulate[(every * splits,)](
            rows, codes.keys, self._values, listed, found.starts, self._settings, codes.largest, totals, vectors,
            powers, codes.room, many, found.tiles, splits, alpha, d, columns, dv, width, held_keys(columns, width),
            num_warps=warps(columns, width),
        )  # fmt: skip
        output = new(heads, many, dv, dtype=rows.dtype)
        facts, reported = new(4, heads, many), new(heads, many, dtype=torch.int64)
        merge[(every,)](
            totals, vectors, powers, self._centre, self._radius, self._cast, output, facts, reported, many, every,
            splits, alpha, dv, width, splits, num_warps=4,
        )  # fmt: skip
        return output, facts, reported, found.row_starts.diff().reshape(heads, many)

    def _nothing(self, heads: int) -> tuple[torch.Tensor, ...]:
        """What `_block` returns for no rows."""
        none = torch.empty(4, heads, 0, dtype=torch.float64, device=self._device)
        empty = none[0].long()
        return self._values.new_empty(heads, 0, self._values.shape[2]), none, empty, empty

    def _like(self, name: str, v: torch.Tensor, k: torch.Tensor, dtype: str) -> torch.Tensor:
        """v as (g, t, dv), if it has the tokens of k."""
        values = tensors.floats(name, v, (k.ndim,), self._device, dtype)
        if v.shape[:-1] != k.shape[:-1]:
            raise ArgumentError(f"{name} must be {(*k.shape[:-1], 'dv')} to match k; got {tuple(v.shape)}")
        return fold(name, values)

    def _hold(self, values: torch.Tensor, first: int) -> None:
        """Values (g, t, dv) from the first place on, in as much room as the keys have."""
        if self._values.shape[1] != self._index.codes.room:
            held = self._values
            self._values = values.new_zeros(len(values), self._index.codes.room, values.shape[2])
            self._values[:, : held.shape[1]] = held
        self._values[:, first : first + values.shape[1]] = values

    def _reach(self, values: torch.Tensor) -> torch.Tensor:
        """Largest distance (g,) of values (g, t, dv) from the centre, rounded up."""
        reach = torch.zeros(len(values), dtype=torch.float64, device=self._device)
        for part in values.split(1 << 14, 1):
            if part.shape[1]:
                reach = torch.maximum(reach, (part.double() - self._centre[:, None]).norm(dim=2).amax(1))
        return reach * (1 + 1e-12 * values.shape[2])


session = ReluSession  # the table's entry


def held_keys(columns: int, width: int) -> int:
    """Keys that a program of `accumulate` holds at once."""
    return min(WORK // max(columns, width), 16)


def warps(columns: int, width: int) -> int:
    """Warps whose registers hold them."""
    return 8 if max(columns, width) > 256 else 4


def _splits(device: torch.device, rows: int, most: int) -> int:
    """Parts of a row's list, a power of two: enough to fill the multiprocessors."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return 1 << (max(min(processors * RESIDENT // rows, most, 64), 1).bit_length() - 1)

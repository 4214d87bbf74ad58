"""Sampled decode attention on the GPU: buffers of fixed size and the launches of one step.

A step is one launch of CUDA C++ (`gpu.step`) where that has a form for it, and otherwise four of Triton: prepare,
scan, gather, merge.  Nothing is read back by the host and nothing is allocated, so that a step can be captured in a
CUDA graph and replayed while the cache grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from attention.sampled import Sampled
from gpu import encode, moments, planes, prepare, tokens
from gpu.codes import LINE as COUNTERS
from gpu.launches import MEASURED, Tuning, launches, overlap
from gpu.step import Step, properties
from gpu.tokens import Tokens
from hsr import checks
from hsr.coded_scan import KEYS as BLOCK
from hsr.coder import SAMPLE
from hsr.errors import ArgumentError
from hsr.lifted_numba import mixed

WIDTHS = (64, 128, 256)  # head widths that the kernels have a form for
DTYPES = (torch.float16, torch.bfloat16)
GROUP = 16  # most query heads of a key-value head
NEWEST = 1024  # keys that tell of a drift
STARVED = 4  # a list of fewer than budget / STARVED keys is not trusted
SHARE = 32  # keys of a full list that are worth a gathering program
ROOMY = 4  # times the budget of all heads that a list can hold; from half of that on it counts as crowded


@dataclass(frozen=True)
class Draws:
    """What a cache draws, and what it always keeps; as `attention.sampled.Sampled`.

    Args:
        budget: keys that a query head draws on average.
        bytes_per_key: 16, 24, 32, 48, 64, 96 or 128.
        sinks, recent: kept always; recent at least 64, because younger blocks have no codes yet.
        seed, redraw, systematic: of the draw.
        widths: bits that a code may have: (4, 2), or (4,), whose scan is faster and a little less sharp per byte.
        least: budgets that `gpu.spread.adjust` may move go no lower; None where they stay.
        listing: whether a single launch leaves the drawn keys in ``drawn``, as `gpu.spread` needs; four always do.
    """

    budget: float
    bytes_per_key: int = 32
    sinks: int = 4
    recent: int = 64
    seed: int = 0
    redraw: bool = True
    systematic: bool = True
    widths: tuple[int, ...] = planes.WIDTHS
    least: float | None = None
    listing: bool = False

    @classmethod
    def of(cls, policy: Sampled, **others: Any) -> Draws:
        """What a policy draws, but for what is given otherwise."""
        names = "budget", "bytes_per_key", "sinks", "recent", "seed", "redraw"
        own = {name: getattr(policy, name) for name in names} | {"systematic": policy.draw == "systematic"}
        return cls(**own | others)

    def certain(self, n: int) -> int:
        """How many of n keys are attended to without a draw, see `gpu.codes.span`."""
        start = min(n, self.sinks)
        return n - max(max(n - self.recent, 0) // BLOCK * BLOCK, start) + start


class SampledCache:
    """Keys and values of one layer with their codes, and the buffers of a decode step.

    Args:
        k, v: (B, g, n, d) float16 or bfloat16, d 64, 128 or 256, copied; `adopted` tokens are used in place instead.
        heads: h, query heads, a multiple of g, at most 16 times it.
        draws: what to draw.
        scale: of the scores.
        room: tokens that the cache can hold; None is n and a quarter more.
        lengths: (B,) tokens of each sequence, at most n; None means n for all.
        queries: (B, h, m, d) like those to come, which the codes are then made for; None where none are known.
        coded: planes fitted before, for B * g heads; None fits them here.
        tuning: shapes of the launches.

    Attributes:
        dense_below: tokens below which a step of one launch (`single`) attends to every key, without drawing; 0 at
            first. `drawn` is then left as it was.

    Raises:
        ArgumentError: shapes, dtypes or settings that the kernels have no form for.
    """

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        draws: Draws,
        scale: float,
        *,
        room: int | None = None,
        lengths: Any = None,
        queries: torch.Tensor | None = None,
        coded: planes.Planes | None = None,
        tuning: Tuning = MEASURED,
    ) -> None:
        _check(k, v, heads, k.shape[1] if k.ndim == 4 else 0, draws)
        self._build(Tokens(k, v, room), k.shape[2], heads, draws, scale, lengths, queries, coded, tuning)

    @classmethod
    def adopted(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        draws: Draws,
        scale: float,
        *,
        lengths: Any,
        pages: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
        coded: planes.Planes | None = None,
        tuning: Tuning = MEASURED,
    ) -> SampledCache:
        """A cache over tokens that lie elsewhere; appended ones are written there, too.

        Args:
            k: buffer (B, g, room, d) of any strides with contiguous rows; or, with pages, a pool (count, page, g, d)
                of pages of 1, 2, 4, .. 64 tokens.
            v: likewise.
            heads: as for the class.
            draws: as for the class.
            scale: as for the class.
            lengths: (B,) tokens that each sequence has.
            pages: (B, most) int32, the pages of each sequence in order; a row names valid pages throughout, those not
                yet in use too.
            queries: as for the class.
            coded: as for the class.
            tuning: as for the class.

        Raises:
            ArgumentError: as for the class, or a layout that the kernels cannot read.
        """
        _check(k, v, heads, (k.shape[1] if pages is None else k.shape[2]) if k.ndim == 4 else 0, draws)
        cache = cls.__new__(cls)
        cache._build(Tokens.adopted(k, v, pages), None, heads, draws, scale, lengths, queries, coded, tuning)
        return cache

    def _build(
        self,
        held: Tokens,
        given: int | None,
        heads: int,
        draws: Draws,
        scale: float,
        lengths: Any,
        queries: torch.Tensor | None,
        coded: planes.Planes | None,
        tuning: Tuning,
    ) -> None:
        sizes = tokens.sizes(lengths, held, given)
        if coded is not None and coded.mean.shape != (held.batch * held.groups, held.width + 1):
            raise ArgumentError(
                f"coded must have maps of {held.batch * held.groups} heads of width {held.width}; got "
                f"{len(coded.mean)} of width {coded.mean.shape[1] - 1}"
            )
        self.tokens, self.draws, self.scale, self.tuning = held, draws, scale, tuning
        self.batch, self.groups, self.width, self.per = held.batch, held.groups, held.width, heads // held.groups
        self.padded = 8 if self.per <= 8 else 16
        self._device = held.keys.device
        self.lengths = _lengths(sizes, self.groups, self._device)
        self.status = torch.zeros(len(self.lengths), 4, dtype=torch.int32, device=self._device)  # see `gpu.gather`
        self.dense_below = 0
        self._queries = queries
        self._code(sizes, coded)

    def _code(self, sizes: np.ndarray, coded: planes.Planes | None) -> None:
        """Codes of all tokens, and the buffers of a step over them."""
        held = self.tokens
        floor = self._describe()
        self.planes = coded or self._fitted(sizes, floor)
        placed = self.planes.on(self._device)
        self._query_map = placed.query_map
        self._maps = placed.key_map, placed.mean, self.centre, floor, placed.half, placed.top
        self._allocate()
        blocks = int(sizes.max()) // BLOCK
        if blocks:
            encode.encode[(blocks, self.batch * self.groups)](
                *self._cache, *self._maps, self.codes, *held.strides, held.most, held.room, self.groups, self.scale,
                self.width, self.planes.columns, self.planes.row, self.planes.count, held.page, num_warps=4,
            )  # fmt: skip
        self.means, self.spreads = self._moments(SAMPLE, newest=False)
        self._choose()

    def _choose(self) -> None:
        """One launch or four: now, because nothing may be compiled while a graph is captured."""
        self._step = Step(self) if self.tuning.single and Step.serves(self) else None

    def drift(self) -> torch.Tensor:
        """(heads,) how far the newest NEWEST codes lie from those that the coder was made for.

        The squared distance of their means over the sum of the variances: 1 is a deviation in every direction.
        """
        means, _ = self._moments(NEWEST, newest=True)
        return (means - self.means).square().sum((1, 2)) / (self.spreads.sum((1, 2)) + moments.TINY.value)

    def recode(self, queries: torch.Tensor | None = None) -> None:
        """Make coder and codes anew, for queries as at first, and wait for it; graphs must be captured again."""
        self._queries = self._queries if queries is None else queries
        budget = self.budget
        self._code(self.lengths.view(self.batch, self.groups)[:, 0].cpu().numpy().astype(np.int64), None)
        self.budget.copy_(budget)

    @property
    def keys(self) -> torch.Tensor:
        """Keys (B, g, room, d), or the pool of them."""
        return self.tokens.keys

    @property
    def values(self) -> torch.Tensor:
        """Values (B, g, room, d), or the pool of them."""
        return self.tokens.values

    @property
    def room(self) -> int:
        """Tokens that a sequence can hold."""
        return self.tokens.room

    @property
    def single(self) -> bool:
        """Whether a step is one launch."""
        return self._step is not None

    @property
    def faster_below(self) -> int:
        """The ``dense_below`` with which steps are fastest; 0 where they take four launches."""
        return 0 if self._step is None else self._step.dense_below

    @property
    def _cache(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and the pages' table; lengths stand for one that no kernel reads."""
        held = self.tokens
        return held.keys, held.values, self.lengths if held.pages is None else held.pages

    def _describe(self) -> torch.Tensor:
        """What evenly spaced tokens of each sequence say of it; returns the floor (heads,) of values' distances."""
        heads, d, held, parts = self.batch * self.groups, self.width, self.tokens, moments.PARTS.value
        new = partial(torch.empty, dtype=torch.float32, device=self._device)
        sums = new(heads, parts, d), new(heads, parts, d, d), new(heads, parts)
        moments.accumulate[(parts, heads, d // moments.ROWS.value + 1)](
            *self._cache, self.lengths, *sums, *held.strides, held.most, self.groups, d, held.page, num_warps=4
        )
        self.centre = new(heads, d)
        self.distance, self.longest, self.directions, floor = (new(heads) for _ in range(4))
        moments.merge[(heads,)](
            *sums, self.lengths, self.centre, self.distance, floor, self.longest, self.directions, d, num_warps=8
        )
        return floor

    def _moments(self, most: int, newest: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and variances (heads, P, R) of the codes of ``most`` tokens, evenly spaced ones or the newest."""
        heads, shape = self.batch * self.groups, self.planes
        means, spreads = torch.empty(
            2, heads, shape.count, shape.columns, dtype=torch.float32, device=self._device
        ).unbind()
        moments.codes[(shape.columns // moments.COLUMNS.value, shape.count, heads)](
            self.codes, self.lengths, self._maps[-1], means, spreads, most, self.room, shape.columns, shape.row,
            shape.count, newest, num_warps=8,
        )  # fmt: skip
        return means, spreads

    def _fitted(self, sizes: np.ndarray, floor: torch.Tensor) -> planes.Planes:
        """A coder for evenly spaced tokens of each sequence."""
        heads, d, many = self.batch * self.groups, self.width, min(SAMPLE, int(sizes.max()))
        at = torch.from_numpy(np.arange(many) * sizes[:, None] // many).to(self._device)
        at = at[:, None].expand(self.batch, self.groups, many)
        keys, values = (self.tokens.rows(part, at).float().reshape(heads, many, d) for part in (self.keys, self.values))
        lift = torch.maximum((values - self.centre[:, None]).norm(dim=2), floor[:, None]).log()
        known = None if self._queries is None else self._queries.float().reshape(heads, -1, d)
        return planes.fitted(keys, lift, self.scale, self.draws.bytes_per_key, known, self.draws.widths)

    def _allocate(self) -> None:
        """Buffers of a step: `gpu.prepare.begin` fills those that it starts from, its kernels the others."""
        heads, per, budget = self.batch * self.groups, self.per, self.draws.budget
        self.floor = max(int(self.draws.least or budget) // STARVED, 1)
        self.splits = _splits(self._device, heads, self.tuning.resident, per * budget)
        new = partial(torch.empty, device=self._device)
        self.codes = torch.zeros(heads, self.room, self.planes.row, dtype=torch.uint8, device=self._device)
        self.queries = new(heads, self.planes.count, self.padded, self.planes.columns, dtype=torch.int8)
        self.rho, self.trim, self.budget, self.sigma, self.tau = new(5, heads, self.padded).unbind()
        self.seeds = new(heads, dtype=torch.int32)
        self.counts, self.found = new(2, heads, COUNTERS.value, dtype=torch.int32).unbind()
        self.parts = new(heads, self.splits, per, self.width)
        self.sums = new(heads, self.splits, per)
        self.lse = new(self.batch, self.groups * per)
        self._list()
        prepare.begin[(heads,)](
            self.seeds, self.counts, self.found, self.rho, self.trim, self.budget, seed_word(self.draws.seed),
            float(budget), self.padded, num_warps=1,
        )  # fmt: skip

    def _list(self) -> None:
        """A list that holds ROOMY times what is expected, or every key."""
        listed = max(256, -(-int(ROOMY * self.draws.budget * self.per) // 64) * 64)
        self.cap = min(listed, self.room)
        self.crowd = self.cap // 2 if listed < self.room else self.cap - 1  # a list of all keys is never crowded
        self.drawn = torch.empty(len(self.lengths), self.cap, dtype=torch.int64, device=self._device)

    def reserve(self, room: int) -> None:
        """Make room for so many tokens in all; graphs that were captured before still use the old memory."""
        if room <= self.room:
            return
        room = -(-room // BLOCK) * BLOCK
        codes = self.codes.new_zeros(self.codes.shape[0], room, self.codes.shape[2])
        codes[:, : self.room] = self.codes
        self.tokens.reserve(room)
        self.codes = codes
        self._list()

    def attended(self, n: int) -> torch.Tensor:
        """(heads,) int64: keys that the last step attended to, of n in each; without ``listing``.

        All of them where it was dense, or where a list that overflowed or starved was replaced.
        """
        drawn, certain = self.counts[:, 0].long(), self.draws.certain(n)
        if not self.single:  # whose counts are the lists'
            trusted = (drawn <= self.cap) & (drawn >= min(self.floor, (n - certain) // 4))
            drawn = torch.where(trusted, drawn, n - certain)
        return drawn + certain

    @torch.inference_mode()  # where lengths were made within it, nothing else may change them
    def shorten(self, count: int) -> None:
        """Forget the newest tokens of every sequence, so many; nothing is checked, and captured graphs stay good.

        A block that is whole no more keeps codes that nobody reads: it is drawn from when `recent`, a block or more,
        have followed it, and so was filled and coded again.  The coder stays as it was fitted.
        """
        self.lengths -= count

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """One token: k, v (B, g, d), rows contiguous.  Nothing is checked; a full cache counts it in ``status``."""
        held = self.tokens
        encode.append[(self.batch * self.groups,)](
            k, v, *self._cache, *self._maps, self.codes, self.lengths, self.status, *k.stride()[:2], *v.stride()[:2],
            *held.strides, held.most, held.room, self.groups, self.scale, self.width, self.planes.columns,
            self.planes.row, self.planes.count, held.page, **overlap(self.tuning), num_warps=4,
        )  # fmt: skip

    def attend(self, q: torch.Tensor, output: torch.Tensor) -> None:
        """q (B, h, d), rows contiguous -> output (B, h, d) of q's dtype, and ``lse`` (B, h).  Nothing is checked."""
        for launch in self.launches(q, output):
            launch()

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor) -> None:
        """`append` of k, v (B, g, d) and `attend` in one: the token is written while thresholds are found."""
        for launch in self.launches(q, output, k, v):
            launch()

    def launches(
        self, q: torch.Tensor, output: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None
    ) -> Iterator[Callable[[], object]]:
        """The launches of a step, in order: all in one, or prepare, scan, gather and merge."""
        if self._step is not None and all(part is None or tokens.aligned(part) for part in (q, k, v)):
            yield partial(self._step, q, output, k, v)
            return
        yield from launches(self, q, output, k, v)

    def retuned(self, **changes: Any) -> None:
        """Change the shapes of launches; for measurements."""
        self.tuning = replace(self.tuning, **changes)
        self._choose()


def _splits(device: torch.device, heads: int, resident: int, listed: float) -> int:
    """Parts of a list, a power of two: what fills the multiprocessors ``resident`` times, but some keys for each."""
    processors = properties(device).multi_processor_count if device.type == "cuda" else 4
    most = max(min(processors * resident // heads, int(listed) // SHARE), 1)
    return min(1 << (most.bit_length() - 1), 64)


def _lengths(sizes: np.ndarray, groups: int, device: torch.device) -> torch.Tensor:
    """sizes (B,) -> (B * groups,) int32; made on the device where they are alike, so that the host copies nothing."""
    if (sizes == sizes[0]).all():
        return torch.full((len(sizes) * groups,), int(sizes[0]), dtype=torch.int32, device=device)
    return torch.from_numpy(np.repeat(sizes, groups).astype(np.int32)).to(device)


def seed_word(seed: int) -> int:
    """The part of `hsr.lifted_numba.generators` that all heads share: int32."""
    mix = mixed(np.uint32(seed & 0xFFFFFFFF) ^ mixed(np.uint32(seed >> 32) + np.uint32(1)))
    return int(np.uint32(mix).view(np.int32))


def _check(k: torch.Tensor, v: torch.Tensor, heads: int, groups: int, draws: Draws) -> None:
    if k.ndim != 4 or k.shape != v.shape:
        raise ArgumentError(f"k and v must be (B, g, n, d), alike on cuda; got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.dtype not in DTYPES or v.dtype != k.dtype:
        raise ArgumentError(f"k and v must be float16 or bfloat16 on cuda; got {k.dtype} and {v.dtype}")
    if k.shape[3] not in WIDTHS:
        raise ArgumentError(f"k must have width {', '.join(map(str, WIDTHS))} on cuda; got {k.shape[3]}")
    if 0 in k.shape:
        raise ArgumentError(f"k must hold at least one key and head; got shape {tuple(k.shape)}")
    per = checks.grouped("q", heads, groups)
    if per > GROUP:
        raise ArgumentError(f"q must have at most {GROUP} heads per key-value head on cuda; got {per}")
    if draws.recent < BLOCK:
        raise ArgumentError(f"recent must be at least {BLOCK} on cuda; got {draws.recent}")

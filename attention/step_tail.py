"""What a decode selector leaves out, brought back: by a random sample with weights, or by the means of its blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from scipy.special import stdtrit

from attention.decode_selector import Attended, Bounds, DecodeSelector, Steps
from attention.estimates import wide
from attention.held_rows import HeldRows
from attention.selectors.top_oracle import TopOracle
from attention.token_lists import Means, TokenLists
from hsr import checks
from hsr.errors import ArgumentError

FEWEST = 8  # keys of a sample that says something of its own spread
TINY = 1e-300
LEAST = 0.8  # confidence from which the bound on a norm holds; see `_Sample.bounds`


@dataclass(frozen=True)
class StepTail(DecodeSelector):
    """The lists of another selector, and something that stands for the keys they leave out.

    ``sampled=b`` draws b of the n_rest keys that a list leaves out, uniformly and without replacement, each with weight
    n_rest / b: sums of weights and of weighted values are unbiased, their ratio nearly so.  Certificates are then
    statistical: the drawn keys bound the mass that the selector left out, which is the result's ``dropped_mass``, and
    the errors of output and log-sum-exp.  The bounds are Student's, with Johnson's term for the weights' skewness, and
    count one key more as drawn, as heavy as the lightest listed one, because heavy keys are what few draws miss.  With
    the oracle's lists they held more often than stated for all weights that were tried.  Where a selector leaves out
    keys heavier than the lightest it lists, and few of them, the bounds hold less often than stated.  On a GPU they do
    not cover that weights are rounded to the values' dtype: 2^-11 or 2^-8 of the largest value, at most.

    ``means=True`` cuts keys into blocks; of each block one pseudo key stands for the keys left out, with their number
    as weight: the mean of the keys, and of the values, that no head of the group lists, or where there are none of the
    whole block.  By Jensen's inequality it weighs less than those keys together, where the list is the group's.
    Nothing is known of the error.

    Args:
        selector: whose lists have neither log weights nor means of their own.
        sampled: keys drawn for each list, at least 8; 0 for none.
        means: whether means stand for them instead.
        block: keys of a block.
        seed: of the draws, 0 .. 2**63 - 1.  Give layers different seeds, so that their errors are independent.
        confidence: of each bound, in [0.8, 1).

    Raises:
        ArgumentError: no decode selector, both or neither of sampled and means, or a value out of range; from sessions,
            lists that have weights or means already.

    Source: uniform tails as in vAttention (arXiv 2510.05688); means of blocks as in FlashPrefill (arXiv 2608.19758).
    """

    selector: DecodeSelector
    sampled: int = 0
    means: bool = False
    block: int = 16
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not isinstance(self.selector, DecodeSelector):
            raise ArgumentError(f"selector must be a decode selector; got {self.selector!r}")
        if not isinstance(self.means, bool):
            raise ArgumentError(f"means must be True or False; got {self.means!r}")
        if 0 < checks.whole("sampled", self.sampled, 0) < FEWEST:
            raise ArgumentError(
                f"sampled must be at least {FEWEST}, so that the draws show their spread, or 0; got {self.sampled}"
            )
        if bool(self.sampled) == self.means:
            raise ArgumentError(f"either sampled or means must stand for the rest; got {self.sampled}, {self.means}")
        checks.whole("block", self.block, 1)
        checks.whole("seed", self.seed, 0, 2**63 - 1)
        checks.real("confidence", self.confidence, LEAST, 1.0)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(TopOracle(32), sampled=32), cls(TopOracle(32), means=True)

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`."""
        steps = self.selector.begin(k, v, queries, scale, batch)
        if self.means:
            return _BlockMeans(self, steps, k, v)
        return _Sample(self, steps, k.device, scale)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """What the selector reads, and the sums of blocks' keys; random numbers are not counted."""
        sums = -(-n // self.block) * d * itemsize if self.means else 0
        return self.selector.bytes_read(n, d, itemsize, group) + sums


def _plain(settings: StepTail, steps: Steps, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
    """The selector's lists, if nothing stands for what they leave out yet."""
    lists = steps.choose(q, k, v)
    if lists.log_weights is not None or lists.means is not None:
        kind = "log weights" if lists.means is None else "means"
        raise ArgumentError(f"selector must leave keys out, which {settings.selector!r} makes up for by its {kind}")
    return lists


@dataclass(frozen=True)
class _Drawn:
    """A step's sample: keys ids (L, b), those that are valid, of n_rest (L,) that ``listed`` (L, W) leaves out.

    Of the listed ones those ``among`` (L, W) count.
    """

    ids: torch.Tensor
    valid: torch.Tensor
    rest: torch.Tensor
    listed: torch.Tensor
    among: torch.Tensor

    @property
    def count(self) -> torch.Tensor:
        """How many were drawn, (L,) int64: b, or all where fewer were left out."""
        return self.valid.sum(1)

    @property
    def log_weight(self) -> torch.Tensor:
        """Of each of them, (L,)."""
        return (self.rest / self.count.clamp(min=1)).log()


class _Sample(Steps):
    """A generator on the device, and what it drew last."""

    def __init__(self, settings: StepTail, steps: Steps, device: torch.device, scale: float) -> None:
        self._settings, self._steps, self._scale, self._wanted = settings, steps, scale, settings.sampled
        self._generator = torch.Generator(device).manual_seed(settings.seed)
        self._drawn: _Drawn | None = None
        self._quantile = float(stdtrit(self._wanted - 1, (1 + settings.confidence) / 2))

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """The selector's."""
        self._steps.append(k, v)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """See `Steps`: the largest of random numbers, of which listed keys have none."""
        lists, n = _plain(self._settings, self._steps, q, k, v), k.shape[1]
        numbers = torch.rand(len(lists.tokens), n, generator=self._generator, device=k.device)
        found = numbers.masked_fill_(lists.mask(n), -1).topk(min(self._wanted, n), sorted=False)
        among = lists.valid()
        listed = lists.tokens.long().masked_fill(~among, 0)
        self._drawn = drawn = _Drawn(found.indices, found.values >= 0, n - lists.counts.long(), listed, among)
        weight = drawn.log_weight[:, None].expand(found.values.shape)
        weights = torch.cat([numbers.new_zeros(lists.tokens.shape), weight], 1)
        ids = torch.cat([lists.tokens, drawn.ids.int()], 1)
        return TokenLists.from_ids(ids, torch.cat([among, drawn.valid], 1), weights)

    def bounds(self, seen: Attended) -> Bounds:
        """Of the last choice.

        With ``x_j = exp(s_j - lse)``, n_rest times the drawn keys' mean is the estimate of what was left out, its
        variance ``n_rest^2 (1 - b / n_rest) / b`` times theirs.  The output is off by the same mean of ``x_j (v_j -
        output)``.  The norm of a normal vector exceeds t times the root of its mean square no more often than in one
        dimension, for t^2 above 1.54 (Szekely and Bakirov 2003), so that Student's t bounds it.  The estimate is low
        more often, and by more, than high where x is skewed; Johnson (1978) has the term that Student's t lacks then.
        """
        assert self._drawn is not None
        drawn, H, lines = self._drawn, len(seen.q), len(self._drawn.ids)
        head = torch.arange(H, device=seen.q.device) * lines // H
        ids, valid, rest, count = drawn.ids[head], drawn.valid[head], drawn.rest[head].double(), drawn.count[head]
        shares = self._shares(seen, ids).masked_fill(~valid, 0.0)  # (H, b) of the estimated sum
        lightest = self._shares(seen, drawn.listed[head]).masked_fill(~drawn.among[head], torch.inf).amin(1)
        lightest = torch.where(lightest.isfinite(), lightest, 0.0)[:, None]  # (H, 1)
        off = (seen.v[_sources(seen, ids), ids].double() - seen.output[:, None].double()) * valid[:, :, None]
        many = count.clamp(min=1).double()
        factor = rest * ((1 - many / rest.clamp(min=1)).clamp(min=0) / many).sqrt()

        one_more = torch.cat([shares, lightest], 1), torch.nn.functional.pad(valid, (0, 1), value=True)
        deviation, third = _moments(*one_more)
        apart = factor * deviation
        skewed = factor**2 / rest.clamp(min=1) * third / deviation.square().clamp(min=TINY)
        high = self._quantile * apart + skewed * (1 / 6 + self._quantile**2 / 3)
        left_out = rest * shares.sum(1) / many
        most = left_out + high
        certain = 1 - left_out + shares.sum(1)  # the listed keys and the drawn ones are there
        least = torch.maximum(1 - self._quantile * apart, certain.clamp(min=TINY))
        mass = most / (1 - left_out + most).clamp(min=TINY)

        moved = _moments(shares[:, :, None] * off, valid)[0]
        missed = lightest[:, 0] * (off.square().sum((1, 2)) / many).sqrt() / (many + 1).sqrt()
        error = self._quantile * factor * torch.hypot(moved, missed) / least
        lse_error = torch.maximum(high.log1p(), -least.log())
        found = [x.nan_to_num(torch.inf, torch.inf) for x in (mass, error, lse_error)]  # where exponentials overflow
        return Bounds(found[0].clamp(max=1.0), found[1], found[2], self._settings.confidence)

    def _shares(self, seen: Attended, ids: torch.Tensor) -> torch.Tensor:
        """``exp(s - lse)`` of keys ids (H, x), float64, because s and lse may be large: (H, x)."""
        keys = seen.k[_sources(seen, ids), ids].double()
        scores = (keys @ (seen.q.double() * self._scale)[:, :, None])[:, :, 0]
        return (scores - seen.lse[:, None].double()).exp()


def _sources(seen: Attended, ids: torch.Tensor) -> torch.Tensor:
    """The key-value head that each query head of ids (H, x) reads: (H, 1)."""
    return torch.arange(len(ids), device=ids.device)[:, None] * len(seen.k) // len(ids)


def _moments(x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the valid ones of x (H, b), or vectors (H, b, w): standard deviation and third central moment, both (H,)."""
    wide_x = x if x.ndim == 3 else x[:, :, None]
    count = valid.sum(1).double()
    kept = wide_x * valid[:, :, None]
    centred = (kept - kept.sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]) * valid[:, :, None]
    deviation = (centred.square().sum((1, 2)) / (count - 1).clamp(min=1)).sqrt()
    return deviation, centred.pow(3).sum((1, 2)) / count.clamp(min=1)


class _BlockMeans(Steps):
    """Sums of the keys and values of every block."""

    def __init__(self, settings: StepTail, steps: Steps, k: torch.Tensor, v: torch.Tensor) -> None:
        self._settings, self._steps, self._size, self._n = settings, steps, settings.block, k.shape[1]
        self._sums = [HeldRows(self._of(x)) for x in (k, v)]

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (G, t, w) from the first of a block on -> sums (G, ceil(t / size), w)."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self._size))
        return padded.unflatten(1, (-1, self._size)).sum(2, dtype=torch.float64)  # listed keys are taken from them

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Sums of the open block and of those after it."""
        first = self._n // self._size
        for held, x in zip(self._sums, (k, v), strict=True):
            held.put(first, self._of(x[:, first * self._size :]))
        self._n = k.shape[1]
        self._steps.append(k, v)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """See `Steps`; what the group lists is taken from the sums, so that few keys are read."""
        lists, G, n = _plain(self._settings, self._steps, q, k, v), len(k), self._n
        listed = lists.mask(n)  # (L, n)
        of_group = listed.view(G, -1, n).any(1)
        union = TokenLists.from_mask(of_group, min(n, lists.tokens.shape[1] * len(listed) // G))
        sizes = self._blocks(torch.ones_like(listed[:1]))  # (1, C)
        others = sizes - self._blocks(of_group)  # (G, C), listed by no head of the group
        means = [self._mean(held.rows, x, union, sizes, others) for held, x in zip(self._sums, (k, v), strict=True)]
        weights = (sizes - self._blocks(listed)).log()
        return dataclasses.replace(lists, means=Means(means[0], means[1], weights))

    def _blocks(self, marks: torch.Tensor) -> torch.Tensor:
        """How many of each block are marked: (x, n) bool -> (x, C) float32."""
        return torch.nn.functional.pad(marks, (0, -self._n % self._size)).unflatten(1, (-1, self._size)).sum(2).float()

    def _mean(
        self, sums: torch.Tensor, x: torch.Tensor, union: TokenLists, sizes: torch.Tensor, others: torch.Tensor
    ) -> torch.Tensor:
        """Of a block's rows of x (G, n, w) that are not in the union, or of all where there are none: (G, C, w)."""
        ids = union.tokens.long()[:, :, None].expand(-1, -1, x.shape[2])
        rows = x.gather(1, ids).double() * union.valid()[:, :, None]
        rest = sums - torch.zeros_like(sums).scatter_add_(1, ids // self._size, rows)
        alone = (others > 0)[:, :, None]
        mean = torch.where(alone, rest, sums) / torch.where(alone, others[:, :, None], sizes[:, :, None])
        return mean.to(wide(x))

"""Clusters of a prompt's fixed prefix with thresholds on their attention: made once, kept in a file, used often."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from attention.clusters import averages
from attention.estimates import products, wide
from hsr import checks
from hsr.errors import ArgumentError, StorageError

FORMAT = 1
ALIKE = 2.0**-7  # of the keys' size: what a mean key may differ by where the same keys were rounded to other dtypes


@dataclass(frozen=True, eq=False)
class Level:
    """Clusters of one size and the threshold that their attention is held against.

    Attributes:
        owners: (g, M) int64: the cluster of each member, a token or a cluster of the next, finer level.
        sizes: (g, C) int64: tokens in a cluster.
        means: (g, C, d) float32 or float64: their mean key, 0 where there is none.
        sparsity: share of the tokens that lie below the threshold when it is set, in [0, 1).
        threshold: (g,) of the means' dtype, of the logarithm of attention per token; None to set one at every query.
    """

    owners: torch.Tensor
    sizes: torch.Tensor
    means: torch.Tensor
    sparsity: float
    threshold: torch.Tensor | None = None

    def shares(self, q: torch.Tensor, scale: float, alive: torch.Tensor) -> torch.Tensor:
        """``ln S``, attention to one token of each cluster that is alive, of the attention to all of those.

        q (H, m, d), alive (H, m, C) bool -> (H, m, C), -inf of clusters that are empty or not alive.
        """
        sizes = self.sizes.repeat_interleave(len(q) // len(self.sizes), 0)[:, None]
        scores = products(q.to(self.means.dtype), self.means) * scale
        scores = scores.masked_fill(~alive | (sizes == 0), -torch.inf)
        total = (scores + sizes.clamp(min=1).log()).logsumexp(2, keepdim=True)
        return torch.where(scores > -torch.inf, scores - total, -torch.inf)

    def passed(self, shares: torch.Tensor) -> torch.Tensor:
        """Clusters above the threshold: shares (H, m, C) of queries of their own -> (H, m, C) bool."""
        group = len(shares) // len(self.sizes)
        if self.threshold is None:
            sizes = self.sizes.repeat_interleave(group, 0)[:, None].expand_as(shares)
            level = quantile(shares.flatten(0, 1), sizes.flatten(0, 1), self.sparsity).view(*shares.shape[:2], 1)
            return shares > level
        return shares > self.threshold.repeat_interleave(group)[:, None, None]

    def members(self, passed: torch.Tensor) -> torch.Tensor:
        """Members of the clusters that passed (H, m, C): (H, m, M) bool."""
        owners = self.owners.repeat_interleave(len(passed) // len(self.owners), 0)[:, None]
        return passed.gather(2, owners.expand(-1, passed.shape[1], -1))

    def calibrated(self, shares: torch.Tensor, batch: int) -> Level:
        """With one threshold for the heads of each of ``batch`` sequences: of all shares (H, m, C) and their tokens."""
        sizes = self.sizes.repeat_interleave(len(shares) // len(self.sizes), 0)[:, None].expand_as(shares)
        found = quantile(shares.reshape(batch, -1), sizes.reshape(batch, -1), self.sparsity)
        return replace(self, threshold=found[:, 0].repeat_interleave(len(self.sizes) // batch))

    def repeated(self, times: int, device: torch.device) -> Level:
        """The same for as many sequences, on a device."""
        threshold = None if self.threshold is None else self.threshold.to(device).repeat(times)
        owners, sizes, means = (x.to(device) for x in (self.owners, self.sizes, self.means))
        return Level(
            owners.repeat(times, 1), sizes.repeat(times, 1), means.repeat(times, 1, 1), self.sparsity, threshold
        )


@dataclass(frozen=True, eq=False)
class SqueezedPrefix:
    """An index of the first tokens of a cache, from coarse clusters to fine: what `SqueezedAttention` chooses from.

    `attention.selectors.squeezed_attention.PrefixClusters.prefix` makes one; a session of any sequences that begin with
    the same tokens takes it, and so do several at a time.

    Attributes:
        levels: the coarsest first; members of the last are tokens.
        n: tokens of the prefix; those after the clustered ones are its window.
    """

    levels: tuple[Level, ...]
    n: int

    def __repr__(self) -> str:
        g, clustered = self.levels[-1].owners.shape
        counts = ", ".join(str(level.sizes.shape[1]) for level in self.levels)
        return f"SqueezedPrefix(heads={g}, n={self.n}, clustered={clustered}, clusters=({counts}))"

    @property
    def clustered(self) -> int:
        """Tokens in clusters; all others are always attended to."""
        return self.levels[-1].owners.shape[1]

    def means_read(self, n: int) -> float:
        """Mean keys that a step reads, whatever n."""
        return float(sum(level.sizes.shape[1] for level in self.levels))

    def kept(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        """q (H, m, d) -> which clustered tokens each query is shown, (H, m, clustered) bool."""
        alive = torch.ones(*q.shape[:2], self.levels[0].sizes.shape[1], dtype=torch.bool, device=q.device)
        for level in self.levels:
            alive = level.members(level.passed(level.shares(q, scale, alive)))
        return alive

    def calibrated(self, queries: torch.Tensor, scale: float, batch: int = 1) -> SqueezedPrefix:
        """With thresholds from queries (H, m, d), each seeing all clustered tokens; one for all heads of a sequence."""
        levels = []
        alive = torch.ones(*queries.shape[:2], self.levels[0].sizes.shape[1], dtype=torch.bool, device=queries.device)
        for level in self.levels:
            shares = level.shares(queries, scale, alive)
            levels.append(level.calibrated(shares, batch))
            alive = level.members(levels[-1].passed(shares))
        return replace(self, levels=tuple(levels))

    def heads(self, first: int, last: int) -> SqueezedPrefix:
        """Of key-value heads first..last - 1 alone: layers calibrated together, as heads of one, come apart so."""
        g = len(self.levels[0].sizes)
        first = checks.whole("first", first, 0, g - 1)
        own = slice(first, checks.whole("last", last, first + 1, g))
        return replace(self, levels=tuple(_picked(level, own) for level in self.levels))

    def prefix(self, k: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1) -> SqueezedPrefix:
        """The same index for a cache k (G, n, d) of one or more sequences that begin with its tokens.

        Raises:
            ArgumentError: k has another width, other heads, fewer tokens, or begins with other keys.
        """
        g, _, d = self.levels[-1].means.shape
        if k.shape[0] % g or k.shape[2] != d:
            raise ArgumentError(
                f"k must have a multiple of {g} heads of width {d} to match prefix; got {tuple(k.shape)}"
            )
        if k.shape[1] < self.n:
            raise ArgumentError(f"k must begin with the {self.n} tokens of prefix; got {k.shape[1]} tokens")
        found = replace(self, levels=tuple(level.repeated(len(k) // g, k.device) for level in self.levels))
        found._check_keys(k[:, : self.clustered])
        return found

    def _check_keys(self, k: torch.Tensor) -> None:
        """Whether mean keys are those of k (G, clustered, d)."""
        fine = self.levels[-1]
        apart = (averages(k, fine.owners, fine.sizes) - fine.means).abs().amax()
        size = k.abs().amax().to(wide(k))
        if not bool(apart <= ALIKE * size):
            raise ArgumentError(
                f"k must begin with the keys of prefix; got some whose mean is {float(apart):.3g} from a cluster's"
            )

    def save(self, path: str | Path) -> None:
        """Write a file ``.npz`` that `load` reads; an existing one is replaced at once or not at all."""
        path = Path(path)
        arrays: dict[str, Any] = {
            "format": np.array(FORMAT),
            "n": np.array(self.n),
            "levels": np.array(len(self.levels)),
        }
        for i, level in enumerate(self.levels):
            arrays |= {f"{name}{i}": array for name, array in _named(level).items()}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            mask = os.umask(0)
            os.umask(mask)
            Path(temporary).chmod(0o666 & ~mask)  # as of any new file: temporary ones are private
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote, onto the CPU.

        Raises:
            OSError: no such file.
            StorageError: not such a file, of another format, truncated or altered.
        """
        path = Path(path)
        try:
            arrays = _arrays(path)
        except (ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile) as fault:
            raise StorageError(f"{path} is not a saved prefix, or truncated or altered: {fault}") from fault
        if int(_read(path, arrays, "format", (), "i")) != FORMAT:
            raise StorageError(f"{path} has format {arrays['format']}; this library reads format {FORMAT}")
        n, count = (int(_read(path, arrays, name, (), "i")) for name in ("n", "levels"))
        levels: tuple[Level, ...] = ()
        for i in reversed(range(count)):
            levels = (_level(path, arrays, i, levels), *levels)
        if not levels or levels[-1].owners.shape[1] > n:
            raise StorageError(f"{path} must have levels of at most {n} tokens; got {count} levels")
        return cls(levels, n)


def quantile(shares: torch.Tensor, weights: torch.Tensor, share: float) -> torch.Tensor:
    """The least of shares (L, s) that ``share`` of the weights (L, s) does not exceed: (L, 1); a share of 0 gives -inf.

    No more than ``1 - share`` of the weights lies above.
    """
    order = shares.argsort(dim=1)
    total = weights.gather(1, order).double().cumsum(1)
    place = (total < share * total[:, -1:]).sum(1, keepdim=True).clamp(max=shares.shape[1] - 1)
    found = shares.gather(1, order).gather(1, place)
    return found if share > 0 else torch.full_like(found, -torch.inf)


def tokens_in(owners: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens of each cluster (g, count), where members (g, M) of clusters ``owners`` have ``tokens`` (g, M)."""
    return torch.zeros(len(owners), count, dtype=torch.int64, device=owners.device).scatter_add_(1, owners, tokens)


def _picked(level: Level, heads: slice) -> Level:
    """Some heads of it."""
    threshold = None if level.threshold is None else level.threshold[heads]
    return Level(level.owners[heads], level.sizes[heads], level.means[heads], level.sparsity, threshold)


def _named(level: Level) -> dict[str, np.ndarray]:
    """What a file has of a level; sizes follow from owners."""
    threshold = level.means[:0, 0, 0] if level.threshold is None else level.threshold
    tensors = {"owners": level.owners.int(), "means": level.means, "threshold": threshold}
    return {name: x.cpu().numpy() for name, x in tensors.items()} | {"sparsity": np.array(float(level.sparsity))}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, whose checksums are verified before any is read."""
    with zipfile.ZipFile(path) as file:
        altered = file.testzip()
    if altered is not None:
        raise zipfile.BadZipFile(f"the checksum of {altered} does not match")
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def _read(
    path: Path, arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...], kind: str
) -> np.ndarray:
    """The array of that name; StorageError where it has another shape (None is any length) or kind of dtype."""
    found = arrays.get(name)
    if found is None:
        raise StorageError(f"{path} is not a saved prefix: it has no array {name!r}")
    fits = found.ndim == len(shape) and all(a in (b, None) for a, b in zip(shape, found.shape, strict=True))
    if not fits or found.dtype.kind != kind:
        raise StorageError(f"{path} must have {name} of shape {shape}, kind {kind!r}; got {found.shape} {found.dtype}")
    if kind == "f" and np.isnan(found).any():
        raise StorageError(f"{path} must have no NaN in {name}; got some")
    return found


def _level(path: Path, arrays: Mapping[str, np.ndarray], i: int, finer: tuple[Level, ...]) -> Level:
    """Level i of a file, whose members are the clusters of the first of the finer levels, or tokens."""
    shape = finer[0].sizes.shape if finer else (None, None)
    owners = _read(path, arrays, f"owners{i}", shape, "i")
    means = _read(path, arrays, f"means{i}", (len(owners), None, None), "f")
    sparsity = float(_read(path, arrays, f"sparsity{i}", (), "f"))
    threshold = _read(path, arrays, f"threshold{i}", (None,), "f")
    if len(threshold) not in (0, len(means)):
        raise StorageError(f"{path} must have threshold{i} of 0 or {len(means)} numbers; got {len(threshold)}")
    if not 0 <= sparsity < 1:
        raise StorageError(f"{path} must have sparsity{i} in [0, 1); got {sparsity}")
    if owners.size == 0 or owners.min() < 0 or owners.max() >= means.shape[1]:
        raise StorageError(f"{path} must have owners{i} in 0..{means.shape[1] - 1}; got others, or none")
    plain = torch.from_numpy(owners).long()
    sizes = tokens_in(plain, finer[0].sizes if finer else torch.ones_like(plain), means.shape[1])
    return Level(
        plain, sizes, torch.from_numpy(means), sparsity, torch.from_numpy(threshold) if len(threshold) else None
    )

"""MagicPIG: keys that collide with the query in tables of hashes, weighed by how likely that was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch

from attention.clusters import unit
from attention.decode_selector import DecodeSelector, Steps
from attention.draws import gaussians
from attention.estimates import LARGEST, products, wide
from attention.token_lists import TokenLists
from hsr import checks


@dataclass(frozen=True)
class MagicPIG(DecodeSelector):
    """Keys sampled by locality-sensitive hashing, with the weight that makes up for those that were not.

    A table's hash is the signs of K random directions.  A query at angle theta to a key, whose head's mean is taken
    away first, agrees with it in a table with probability ``c = (1 - theta / pi)^K``, and in two or more of L tables
    with ``p = 1 - (1 - c)^L - L c (1 - c)^(L - 1)``.  Keys that do are listed with log weight ``-ln p``, so that
    numerator and denominator are unbiased over the directions; one draw of them serves a whole session.  First and last
    tokens are listed as they are.

    Published code keeps every generated token beside its buffer of 256; here they are hashed too, 256 at a time, once
    they have left the window, about the mean of those that had when the session began (0 where none had).  It finds
    collisions in sorted tables, where here the hashes of all keys are compared, and angles, which matter of listed keys
    alone, are taken of all.  Layers that it leaves dense are the caller's to leave.

    Args:
        planes: K, random directions of a table, in 1..15; 10.
        tables: L, at least 2; 150.
        sinks: first tokens that are always listed; 4.
        recent: last tokens that are; 64.
        refresh: tokens that are hashed at a time once decoding goes on; 256.
        seed: of the directions, at least 0; all heads share them.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2410.16179; Infini-AI-Lab/MagicPIG.
    """

    planes: int = 10
    tables: int = 150
    sinks: int = 4
    recent: int = 64
    refresh: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        checks.whole("planes", self.planes, 1, 15)
        checks.whole("tables", self.tables, 2)
        for name, least in (("sinks", 0), ("recent", 0), ("refresh", 1), ("seed", 0)):
            checks.whole(name, getattr(self, name), least)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(), cls(planes=4, tables=20, sinks=1, recent=8, refresh=16)

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`."""
        return MagicPIGSteps(self, k)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """Hashes of two bytes; a listed key's angle follows from its score, which attention makes."""
        return 2.0 * self.tables * max(0, n - self.sinks - self.recent)


class MagicPIGSteps(Steps):
    """Hashes of all tokens but the first and the last."""

    def __init__(self, settings: MagicPIG, k: torch.Tensor) -> None:
        """k (G, n, d)."""
        self.settings = settings
        d, count = k.shape[2], max(0, k.shape[1] - settings.sinks - settings.recent)
        draws = gaussians(settings.seed, 0, d * settings.tables * settings.planes, k.device)
        self.directions = draws.view(d, -1).to(wide(k))  # (d, L K)
        self.middle = k[:, settings.sinks :][:, :count].sum(1, keepdim=True, dtype=wide(k)) / max(1, count)
        self.hashes = torch.zeros(len(k), settings.tables, 0, dtype=torch.int16, device=k.device)
        self._add(k, count)

    @property
    def known(self) -> int:
        """Tokens up to the last one that has a hash, or a sink."""
        return self.settings.sinks + self.hashes.shape[2]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Hash what has left the window, ``refresh`` tokens at a time."""
        while k.shape[1] - self.settings.recent - self.known >= self.settings.refresh:
            self._add(k, self.settings.refresh)

    def _add(self, k: torch.Tensor, count: int) -> None:
        """Hash the next tokens."""
        step = max(1, LARGEST // (len(k) * self.directions.shape[1]))
        parts = k[:, self.known : self.known + count].split(step, dim=1)
        found = [self._hashed(part.to(self.middle.dtype) - self.middle) for part in parts]
        self.hashes = torch.cat([self.hashes, *(part.mT for part in found)], dim=2)

    def _hashed(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., d) -> the hash in each table, (..., L) int16."""
        signs = (x @ self.directions > 0).unflatten(-1, (self.settings.tables, self.settings.planes))
        powers = 2 ** torch.arange(self.settings.planes, dtype=torch.int16, device=x.device)
        return (signs * powers).sum(-1, dtype=torch.int16)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """A list for each head."""
        n, hashed = k.shape[1], slice(self.settings.sinks, self.known)
        keep = torch.ones(len(q), n, dtype=torch.bool, device=k.device)
        log_weights = torch.zeros(len(q), n, device=k.device)
        keep[:, hashed] = self._collisions(q) >= 2
        log_weights[:, hashed] = -self._log_chances(q, k[:, hashed]).float()
        return TokenLists.from_mask(keep, log_weights=log_weights)

    def _collisions(self, q: torch.Tensor) -> torch.Tensor:
        """q (H, d) -> in how many tables each key agrees with it, (H, n) int32."""
        G, L, n = self.hashes.shape
        asked = self._hashed(q.to(self.middle.dtype)).view(G, -1, L)
        found = torch.zeros(*asked.shape[:2], n, dtype=torch.int32, device=q.device)
        step = max(1, LARGEST // max(1, found.numel()))
        for i in range(0, L, step):
            tables = slice(i, i + step)
            found += (asked[:, :, tables, None] == self.hashes[:, None, tables]).sum(2, dtype=torch.int32)
        return found.flatten(0, 1)

    def _log_chances(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """q (H, d), keys (G, n, d) with hashes -> ln p, (H, n) float64."""
        centred = k.to(self.middle.dtype) - self.middle
        cosines = products(unit(q.to(centred.dtype))[:, None], unit(centred))[:, 0].double()
        zero = ~q.any(1, keepdim=True) & ~centred.any(2).repeat_interleave(len(q) // len(k), 0)
        cosines = torch.where(zero, 1.0, cosines)  # both have no sign above 0, and agree in every table
        return log_chance(cosines.clamp(-1, 1), self.settings.planes, self.settings.tables)


def log_chance(cosines: torch.Tensor, planes: int, tables: int) -> torch.Tensor:
    """ln of the chance to agree in two tables or more, at float64 cosines of any shape.

    ``1 - (1 - c)^(L - 1) (1 + (L - 1) c)``, which cancels where c is small; there its first term ``L (L - 1) c^2 / 2``.
    """
    log_c = planes * (1 - cosines.arccos() / math.pi).clamp(min=1e-30).log()
    c = log_c.exp()
    exact = -torch.expm1((tables - 1) * torch.log1p(-c) + torch.log1p((tables - 1) * c))
    few = 2 * log_c + math.log(tables * (tables - 1) / 2)
    return torch.where(tables * c < 1e-6, few, exact.log())

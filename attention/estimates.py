"""What selectors estimate attention by, in tensors: pooled keys, the last rows of a prompt, shares that cover a mass.

Sizes are fixed and nothing waits for the device.  Half precision is multiplied as it is and goes on in float32.
"""

from __future__ import annotations

import torch

from attention.key_lists import KEYS, ROWS

LARGEST = 1 << 27  # scores held at a time, about, over all heads


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q (H, r, d), k (G, c, d) -> (H, r, c) float32, or float64 of float64; a group's queries share its keys."""
    found = q.reshape(len(k), -1, q.shape[2]) @ k.mT
    return found.to(wide(found)).view(len(q), q.shape[1], k.shape[1])


def wide(x: torch.Tensor) -> torch.dtype:
    """What sums of its entries are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def pooled(x: torch.Tensor) -> torch.Tensor:
    """Sums over blocks of 128: (H, n) -> (H, ceil(n / 128))."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % KEYS)).unflatten(1, (-1, KEYS)).sum(2)


def means(x: torch.Tensor) -> torch.Tensor:
    """Of blocks of 128 rows: x (H, n, d) -> (H, ceil(n / 128), d) of its dtype, the last of as many as there are."""
    n = x.shape[1]
    sums = torch.nn.functional.pad(x, (0, 0, 0, -n % KEYS)).unflatten(1, (-1, KEYS)).sum(2, dtype=wide(x))
    sizes = (n - KEYS * torch.arange(sums.shape[1], device=x.device)).clamp(max=KEYS)
    return (sums / sizes[:, None]).to(x.dtype)


def last_rows(q: torch.Tensor, k: torch.Tensor, scale: float, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean attention of the last rows of a prompt, by key and by distance from row to key: both (H, n), sums 1."""
    heads, n, R = len(q), k.shape[1], min(rows, q.shape[1])
    group = heads // len(k)
    step = max(1, LARGEST // (group * R * n))
    parts = [
        _means_of(_attention(q[group * g : group * (g + step), -R:], k[g : g + step], scale))
        for g in range(0, len(k), step)
    ]
    by_key, by_distance = (torch.cat(part) for part in zip(*parts, strict=True))
    return by_key, by_distance


def _attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """q (H, R, d), the last rows of n -> (H, R, n), causal."""
    R, n = q.shape[1], k.shape[1]
    position = n - R + torch.arange(R, device=q.device)
    later = torch.arange(n, device=q.device) > position[:, None]
    return (products(q, k) * scale).masked_fill_(later, -torch.inf).softmax(2)


def _means_of(shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares (H, R, n) of the last rows -> their means by key and by distance.

    Row i has position ``n - R + i``, so that distance D of it is entry ``D + R - 1 - i`` from the right: with R zeros
    added to every row, rows one entry shorter than they are have equal distances below each other.
    """
    heads, R, n = shares.shape
    reverse = torch.nn.functional.pad(shares.flip(2), (0, R))  # (H, R, n + R), contiguous
    skewed = reverse.as_strided((heads, R, n), (R * (n + R), n + R - 1, 1), R - 1)
    return shares.mean(1), skewed.mean(1)


def block_attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Mean attention of row blocks to key blocks: q (H, m, d), k (G, n, d) -> (H, T, C), every line's sum 1.

    Exact, and thus as much work as dense attention's scores.
    """
    (heads, m, _), n = q.shape, k.shape[1]
    step = max(1, LARGEST // (heads * ROWS * n))  # row blocks at a time
    parts = []
    for first in range(0, m, step * ROWS):
        last = min(first + step * ROWS, m)
        shares = _attention(q[:, first:last], k[:, : n - m + last], scale)
        shares = torch.nn.functional.pad(shares, (0, n - shares.shape[2], 0, -(last - first) % ROWS))
        sums = pooled(shares.unflatten(1, (-1, ROWS)).sum(2).flatten(0, 1)).unflatten(0, (heads, -1))
        sizes = (m - first - ROWS * torch.arange(sums.shape[1], device=q.device)).clamp(max=ROWS)
        parts.append(sums / sizes[:, None])
    return torch.cat(parts, 1)


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Distance of distributions, the square root of their divergence in nats: (H, C) each -> (H, 1), at most 0.8326."""
    middle = (p + q) / 2
    apart = sum((torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(1, keepdim=True) for x in (p, q))
    return (torch.as_tensor(apart).clamp(min=0) / 2).sqrt()


def vertical_slash(
    by_key: torch.Tensor, by_distance: torch.Tensor, share: float | torch.Tensor, phase: int, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key blocks (H, C) and block distances (H, >= C + 1), from -1 on, that each hold a share of a mean attention.

    ``by_key`` and ``by_distance`` (H, n) are those of `last_rows`, phase as of `by_block_distance`.  Block 0, the
    diagonal and at least ``least`` entries of both are taken.
    """
    blocks, crossed = pooled(by_key), by_block_distance(by_distance, phase)
    return (
        covering(blocks, share, torch.arange(blocks.shape[1], device=blocks.device) == 0, least),
        covering(crossed, share, torch.arange(crossed.shape[1], device=blocks.device) <= 1, least),
    )


def by_block_distance(by_distance: torch.Tensor, phase: int) -> torch.Tensor:
    """Attention (H, n) by distance -> by distance in blocks, from -1 on, of rows that begin ``phase`` into a block.

    Of 128 rows, distance D lies ``(D - phase) // 128`` blocks back for all but ``(D - phase) % 128``, and one more for
    those.
    """
    n = by_distance.shape[1]
    shifted = torch.nn.functional.pad(by_distance, (KEYS - phase, (phase - n) % KEYS)).unflatten(1, (-1, KEYS))
    rest = torch.arange(KEYS, device=by_distance.device, dtype=by_distance.dtype) / KEYS
    near, next_one = (shifted * (1 - rest)).sum(2), (shifted * rest).sum(2)
    return torch.nn.functional.pad(near, (0, 1)) + torch.nn.functional.pad(next_one, (1, 0))


def ranks(mass: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Place of each entry (H, w) when the forced ones come first, then the largest: (H, w) int64."""
    return _order(mass, forced).argsort(1)


def covering(mass: torch.Tensor, share: float | torch.Tensor, forced: torch.Tensor, least: int = 0) -> torch.Tensor:
    """The forced entries and as many of the largest as reach a share of the mass (H, w) with them: (H, w) bool.

    The entry that crosses the share is in.  Share a number or (H, 1); at least ``least`` entries are taken.
    """
    order = _order(mass, forced)
    sorted_mass = mass.gather(1, order).double()
    total = sorted_mass.cumsum(1)
    place = torch.arange(mass.shape[1], device=mass.device)
    taken = (total - sorted_mass < share * total[:, -1:]) | (place < least) | forced.expand_as(mass).gather(1, order)
    return torch.zeros_like(taken).scatter_(1, order, taken)


def _order(mass: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    return mass.masked_fill(forced, torch.inf).argsort(dim=1, descending=True, stable=True)

"""What tests of decode selectors share: caches as tensors, lists as sets, and a watch on what reads tensors back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attention.decode_selector import DecodeSelector, Steps
from attention.token_lists import TokenLists, check

SIZES = (1, 2, 15, 16, 17, 130, 700)  # n
READS = ("tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__", "to_list")
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "equal")


class Cache(NamedTuple):
    """One query a head over keys and values; of a batch of 1."""

    q: torch.Tensor  # (H, d)
    k: torch.Tensor  # (G, n, d)
    v: torch.Tensor  # (G, n, dv)

    @property
    def scale(self) -> float:
        return self.k.shape[2] ** -0.5

    def head(self, x: int) -> tuple[np.ndarray, np.ndarray]:
        """A query (d,), scaled, and the keys (n, d) that it reads, float64."""
        g = x * len(self.k) // len(self.q)
        return self.scale * self.q[x].double().numpy(), self.k[g].double().numpy()


class Stateless(DecodeSelector, Steps):
    """A selector that knows nothing of the cache; what it chooses is left to the test."""

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return ()

    def begin(self, k: Any, v: Any, queries: Any, scale: float, batch: int = 1) -> Steps:
        return self

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        return 0.0

    def append(self, k: Any, v: Any) -> None:
        pass


def cache(seed: int, n: int, g: int = 2, group: int = 2, d: int = 16, sharp: float = 2.0, dv: int = 8) -> Cache:
    """Scores with enough spread that something is worth choosing, keys that drift, and a sink; no ties."""
    random = np.random.default_rng(seed)
    drift = np.cumsum(random.standard_normal((g, n, d)), axis=1) / np.sqrt(np.arange(1, n + 1))[:, None]
    q, k = sharp * random.standard_normal((g * group, d)), random.standard_normal((g, n, d)) + 0.5 * drift
    k[:, 0] += q.reshape(g, group, d).mean(axis=1)
    v = random.standard_normal((g, n, dv))
    return Cache(*(torch.from_numpy(x.astype(np.float32)) for x in (q, k, v)))


@st.composite
def caches(draw: st.DrawFn) -> Cache:
    """Keys with ties, duplicates, zeros and huge norms among them, few or some hundreds; any heads and width."""
    seed, n = draw(st.integers(0, 2**32 - 1)), draw(st.one_of(st.integers(1, 40), st.integers(41, 500)))
    made = cache(seed, n, draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from((4, 16, 20))))
    random = torch.Generator().manual_seed(seed)
    k = made.k
    match draw(st.sampled_from(("plain", "lattice", "repeated", "alike", "zero", "huge", "mixed"))):
        case "lattice":
            k = torch.randint(-1, 2, k.shape, generator=random).float()
        case "repeated":
            k = k[:, torch.randint(0, n // 8 + 1, (n,), generator=random)]
        case "alike":
            k = k[:, :1].expand(k.shape).clone()
        case "zero":
            k = torch.zeros_like(k)
        case "huge":
            k = 1e4 * k
        case "mixed":
            k = k * 10.0 ** torch.randint(-6, 5, (len(k), n, 1), generator=random)
    return made._replace(k=k)


def lists_of(selector: DecodeSelector, made: Cache, begin: int | None = None, batch: int = 1) -> TokenLists:
    """What it lists for the query, having begun with so many of the tokens and learned of the others at once."""
    first = made.k.shape[1] if begin is None else begin
    state = selector.begin(made.k[:, :first], made.v[:, :first], None, made.scale, batch)
    if first < made.k.shape[1]:
        state.append(made.k, made.v)
    found = state.choose(made.q, made.k, made.v)
    check(found, len(made.q), len(made.k), made.k.shape[1])
    return found


def sets(lists: TokenLists, heads: int) -> list[set[int]]:
    """What each query head attends to, means left aside."""
    lines = [set(map(int, lists.tokens[line, : lists.counts[line]])) for line in range(len(lists.tokens))]
    return [lines[x * len(lines) // heads] for x in range(heads)]


def listed(selector: DecodeSelector, made: Cache, begin: int | None = None, batch: int = 1) -> list[set[int]]:
    return sets(lists_of(selector, made, begin, batch), len(made.q))


def best(scores: Iterable[float], count: int) -> set[int]:
    """Places of the largest scores."""
    found = list(scores)
    return set(sorted(range(len(found)), key=lambda i: -found[i])[:count])


def together(*parts: Cache) -> Cache:
    """A batch of sequences, folded into the heads."""
    return Cache(*(torch.cat(part) for part in zip(*parts, strict=True)))


class _NoReads(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in READS, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


class _NoSyncs(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in SYNCS, f"{name} waits for the device"
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in places)
        assert not by_mask, "an index of booleans waits for the device"
        assert not (name == "repeat_interleave" and func._overloadname != "self_int"), "repeats wait for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_read_back() -> Iterator[None]:
    """Whatever would make a host wait for a GPU raises, on a CPU too."""
    with _NoReads(), _NoSyncs():
        yield

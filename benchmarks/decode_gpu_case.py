"""One decode step on the GPU against the fastest dense kernels, all replayed from CUDA graphs over rotating inputs.

A step of ours is complete: the token is appended, queries are coded, thresholds set, codes scanned, drawn keys
attended to, parts merged.  Inputs rotate so that no replay finds them in the L2 cache.  Keys, values and queries are
synthetic: spectra that fall as ``i ** -1/2``, a mean per head, scores of a few nats' deviation.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gate import WrongAnswer
from gpu.planes import Planes
from gpu.sampled import Draws, SampledCache

DEVICE = torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda, missing"
BATCHES = (1, 8, 32)
SHAPES = ((32, 8, 128), (14, 2, 64), (16, 1, 256))  # h, g, d
LENGTHS = tuple(1 << k for k in range(13, 21))
BATCHED = (8192, 32768, 131072)  # lengths measured for more than one sequence
MEMORY = 18e9  # bytes of keys and values of one input
ROTATED = 4e8  # bytes of codes, at least, that a round of rotating inputs reads
COPIES = 24
ROOM = 2048  # tokens that the measurements may append
REPLAYS = 9
SCANNED = 2.0  # keys a head draws where the scan alone is timed
BUILT = 32768  # tokens whose codes' making is timed
FAITHFUL = 2.0  # times the error of drawing by exact scores that drawing by codes may have
EXACT = 6e-3  # largest relative error of an output over all keys, bfloat16

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One of our two settings: bytes per key by width, and which share of the keys a head draws."""

    name: str
    row: dict[int, int]
    share: float
    least: int
    most: int
    widths: tuple[int, ...] = (4, 2)

    def draws(self, d: int, n: int) -> Draws:
        """What to draw from n keys."""
        return Draws(float(min(max(n * self.share, self.least), self.most)), self.row[d], widths=self.widths)


SETTINGS = (
    Setting("fast", {64: 24, 128: 24, 256: 48}, 0.012, 192, 768),
    Setting("quality", {64: 32, 128: 48, 256: 96}, 0.024, 384, 2048),
    Setting("nibbles", {64: 32, 128: 32, 256: 64}, 0.012, 192, 768, widths=(4,)),  # as many axes, all of 4 bits
)


@dataclass(frozen=True)
class Inputs:
    """Keys and values (B, g, n, d), queries (2, B, h, d), one more token (B, g, d), all bfloat16."""

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    token: torch.Tensor


def missing() -> str | None:
    """What this case needs and has not."""
    return None if torch.cuda.is_available() else "decode-gpu needs an NVIDIA GPU, and torch and triton built for it"


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[dict[str, object]]:
    """A row per batch, shape, length and setting."""
    read = read_bandwidth()
    note(f"read bandwidth of this GPU, 1 GiB reduction: {read / 1e9:.0f} GB/s; hbm_fraction is of that")
    exact_gate()
    if importlib.util.find_spec("flash_attn_interface") is None:
        note("FlashAttention-3 is not installed here: not among the dense kernels")
    shapes, lengths, batches = (SHAPES[:1], LENGTHS[:1], BATCHES[:1]) if quick else (SHAPES, LENGTHS, BATCHES)
    for h, g, d in shapes:
        fits: dict[str, Planes] = {}
        for B in batches:
            for n in lengths:
                if B * g * n * d * 4 > MEMORY or (B > 1 and n not in BATCHED):
                    continue
                inputs = made(B, h, g, d, n)
                dense = dense_times(inputs)
                best = min(dense, key=lambda name: dense[name])
                for setting in SETTINGS if (B, d) == (1, 128) else SETTINGS[:2]:
                    row = ours(inputs, setting, fits, read)
                    us = row.pop("us")
                    yield {
                        "B": B, "h": h, "g": g, "d": d, "n": n, "policy": setting.name,
                        "bytes_per_key": setting.row[d], "us": us, "dense_best": best, "dense_best_us": dense[best],
                        "speedup": dense[best] / us, **row, "dense_us": dense,
                    }  # fmt: skip
                del inputs
                torch.cuda.empty_cache()


def made(B: int, h: int, g: int, d: int, n: int) -> Inputs:
    """Fresh inputs, the same for the same shape."""
    random = torch.Generator(device="cuda").manual_seed(n + d)
    spectrum = torch.arange(1, d + 1, device="cuda").float() ** -0.5
    spectrum /= spectrum.square().mean().sqrt()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=random)

    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d)))[0].cuda()
    mean = torch.randn(1, g, 1, d, generator=torch.Generator().manual_seed(g)).cuda()
    k = torch.empty(B, g, n, d, dtype=torch.bfloat16, device="cuda")
    v = torch.empty_like(k)
    for b in range(B):
        k[b] = ((normal(1, g, n, d) * spectrum) @ turn + mean)[0]
        v[b] = normal(g, n, d) + 0.5
    q = ((normal(1, B, h, d) + normal(2, B, h, d)) * spectrum.sqrt()) @ turn
    return Inputs(k, v, (0.9 * q).bfloat16(), normal(B, g, d).bfloat16())


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (h, d), k, v (g, n, d) -> output (h, d) float64 and scores (g, G, n) float64."""
    g, _, d = k.shape
    scores = torch.einsum("gid,gnd->gin", q.double().reshape(g, -1, d), k.double()) * d**-0.5
    return torch.einsum("gin,gnd->gid", scores.softmax(-1), v.double()).reshape(-1, d), scores


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean over heads of the relative error of outputs (h, d)."""
    return float(((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())


def exact_gate() -> None:
    """A budget beyond all keys must give exact attention, for every shape and an odd length."""
    for h, g, d in SHAPES:
        inputs = made(2, h, g, d, 1777)
        cache = SampledCache(inputs.k, inputs.v, h, replace(SETTINGS[0].draws(d, 1777), budget=1e7), d**-0.5)
        output = torch.full_like(inputs.q[0], torch.nan)
        for q in inputs.q:
            cache.attend(q, output)
            for b in range(2):
                error = relative(output[b], exact_attention(q[b], inputs.k[b], inputs.v[b])[0])
                if not error < EXACT:
                    raise WrongAnswer(f"sampled decode over all keys is off by {error:.2e} at {(h, g, d)}")


def top_keys(scores: torch.Tensor, v: torch.Tensor, many: int) -> torch.Tensor:
    """Oracle: every head's ``many`` best keys, joined over its group: scores (g, G, n) -> output (h, d)."""
    best = scores.topk(many, dim=2).indices
    union = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True).any(1, keepdim=True)
    weights = scores.masked_fill(~union, -torch.inf).softmax(-1)
    return torch.einsum("gin,gnd->gid", weights, v.double()).reshape(-1, v.shape[2])


def ideal_error(scores: torch.Tensor, v: torch.Tensor, output: torch.Tensor, draws: Draws) -> float:
    """Mean over heads of the root mean square relative error that drawing independently by exact scores would have.

    scores (g, G, n), output (h, d) float64, v (g, n, d).
    """
    g, _, n = scores.shape
    values = v.double()
    lifted = scores + (values - values.mean(1, keepdim=True)).norm(dim=2).log()[:, None]
    high = lifted.logsumexp(2, keepdim=True) - np.log(draws.budget)
    low = high - 60.0
    for _ in range(40):
        middle = (low + high) / 2
        many = (lifted - middle).clamp_(max=0).exp_().sum(2, keepdim=True) > draws.budget
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    chance = (lifted - high).clamp_(max=0).exp_().amax(1, keepdim=True)
    chance[..., : draws.sinks], chance[..., n - draws.recent :] = 1.0, 1.0
    out = output.reshape(g, -1, output.shape[1])
    apart = values.square().sum(2)[:, None] - 2 * out @ values.mT + out.square().sum(2, keepdim=True)
    variance = ((1 / chance - 1) * scores.softmax(-1).square() * apart).sum(2)
    return float((variance.sqrt() / out.norm(dim=2)).mean())


def ours(inputs: Inputs, setting: Setting, fits: dict[str, Planes], read: float) -> dict[str, Any]:
    """Errors, then times, of one setting."""
    B, g, n, d = inputs.k.shape
    h = inputs.q.shape[2]
    draws = setting.draws(d, n)
    if setting.name not in fits:
        queries = inputs.q[0, :1, :, None]
        fits[setting.name] = SampledCache(
            inputs.k[:1], inputs.v[:1], h, draws, d**-0.5, queries=queries
        ).planes  # one fit for all
    fit = fits[setting.name]
    repeated = replace(fit, query_map=tiled(fit.query_map, B), key_map=tiled(fit.key_map, B), mean=tiled(fit.mean, B))
    first = SampledCache(inputs.k, inputs.v, h, draws, d**-0.5, room=n + ROOM, coded=repeated)
    held = 2 * first.keys.numel() * first.keys.itemsize
    copies = clones(first, int(np.clip(ROTATED / first.codes.nbytes, 1, min(COPIES, 6e10 / held))))
    outputs = torch.full_like(inputs.q[0], torch.nan)
    calls = [
        lambda cache=cache, q=q: cache.step(q, inputs.token, inputs.token, outputs)
        for cache in copies
        for q in inputs.q
    ]
    for _ in range(3):  # the correction of thresholds settles
        for call in calls[:2]:
            call()
    errors, oracle, ideal, counts = [], [], [], []
    for q in inputs.q:
        outputs.fill_(torch.nan)
        first.step(q, inputs.token, inputs.token, outputs)
        size = int(first.lengths[0])
        keys, values = first.keys[0, :, :size], first.values[0, :, :size]
        wanted, scores = exact_attention(q[0], keys, values)
        errors.append(relative(outputs[0], wanted))
        many = min(int(draws.budget) + draws.sinks + draws.recent, size)
        oracle.append(relative(top_keys(scores, values, many), wanted))
        ideal.append(ideal_error(scores, values, wanted, draws))
        counts.append(float(first.counts[:, 0].float().mean()))
        del scores
    rel_err, oracle_err, ideal_err, union = (float(np.mean(found)) for found in (errors, oracle, ideal, counts))
    if not rel_err < FAITHFUL * ideal_err + EXACT:
        raise WrongAnswer(
            f"{setting.name} at {(B, h, g, d, n)} errs by {rel_err:.4f}; "
            f"drawing by exact scores would by {ideal_err:.4f}"
        )
    us = replay_us(calls)
    attend_us = replay_us([partial(cache.attend, q, outputs) for cache in copies for q in inputs.q])
    drawn = [float(first.counts[:, 0].float().mean()), *first.status.sum(0).tolist()]
    for cache in copies:  # hardly anything to attend to: what is left is the scan, and what every step costs
        cache.budget.fill_(SCANNED)
        cache.floor = 0
    for _ in range(8):
        for call in calls:
            call()
    scan_us = replay_us(calls)
    moved = B * g * (n * draws.bytes_per_key + union * 4 * d)
    found: dict[str, Any] = {
        "us": us,
        "rel_err": rel_err,
        "keys_per_head": draws.budget,
        "union_keys": union,
        "scan_us": scan_us,
        "gather_us": us - scan_us,
        "append_us": us - attend_us,
        "launches": 1 if first.single else 4,
        "hbm_fraction": moved / (us * 1e-6) / read,
        "scan_hbm_fraction": first.codes.nbytes / (scan_us * 1e-6) / read,
        "ideal_err": ideal_err,
        "oracle_err": oracle_err,
        "beside_plan": [int(count) for count in drawn[1:]],
    } | build_times(inputs, first, n)
    if first.status[:, -1].any():
        raise WrongAnswer("the cache refused tokens: the measurement appended more than it has room for")
    return found


def build_times(inputs: Inputs, cache: SampledCache, n: int) -> dict[str, float | None]:
    """Milliseconds of the codes' making at the end of a prefill, with the coder known, and of its dense attention."""
    if n != BUILT or inputs.k.shape[0] > 1:
        return {"build_ms": None, "prefill_ms": None}
    h, scale = inputs.q.shape[2], cache.scale
    lengths = np.full(1, n)
    build = lambda: SampledCache.adopted(  # noqa: E731
        inputs.k, inputs.v, h, cache.draws, scale, lengths=lengths, coded=cache.planes
    )
    q = torch.randn(1, h, n, inputs.k.shape[3], device="cuda").bfloat16()

    def prefill() -> object:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return F.scaled_dot_product_attention(q, inputs.k, inputs.v, is_causal=True, enable_gqa=True)

    return {"build_ms": _eager_ms(build), "prefill_ms": _eager_ms(prefill)}


def _eager_ms(call: Call) -> float:
    """Milliseconds of a call from the host's start to the device's end, median of nine."""
    taken = []
    for _ in range(REPLAYS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) * 1e3)
    return float(np.median(taken[1:]))


def tiled(array: np.ndarray, B: int) -> np.ndarray:
    """(g, ...) -> (B g, ...)."""
    return np.tile(array, (B, *[1] * (array.ndim - 1)))


def clones(first: SampledCache, count: int) -> list[SampledCache]:
    """The cache and copies of it in memory of their own."""
    found = [first]
    for _ in range(count - 1):
        other = copy.copy(first)
        for name, value in vars(first).items():
            if torch.is_tensor(value):
                setattr(other, name, value.clone())
        other.tokens = first.tokens.clone()
        other._choose()
        found.append(other)
    return found


def dense_times(inputs: Inputs) -> dict[str, float]:
    """Microseconds of every dense kernel that runs and is right."""
    B, _, n, d = inputs.k.shape
    count = int(np.clip(ROTATED / inputs.k.nbytes, 1, 8))
    pairs = [(inputs.k, inputs.v)] + [(inputs.k.clone(), inputs.v.clone()) for _ in range(count - 1)]
    wanted = exact_attention(inputs.q[0, 0], inputs.k[0], inputs.v[0])[0]

    def sdpa(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

        return attend

    kernels = {
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    if importlib.util.find_spec("flash_attn_interface") is not None:
        from flash_attn_interface import flash_attn_with_kvcache

        lengths = torch.full((B,), n, dtype=torch.int32, device="cuda")

        def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return flash_attn_with_kvcache(
                q[:, None], k.transpose(1, 2), v.transpose(1, 2), cache_seqlens=lengths, causal=False, pack_gqa=True
            )[:, 0]

        kernels["flash-attention 3"] = fa3
    found = {}
    for name, kernel in kernels.items():
        try:
            output = kernel(inputs.q[0], inputs.k, inputs.v)
            if relative(output[0].reshape(-1, d), wanted) < EXACT:
                found[name] = replay_us([partial(kernel, q, k, v) for k, v in pairs for q in inputs.q])
        except RuntimeError:  # this kernel does not serve the shape
            continue
    if not found:
        raise WrongAnswer(f"no dense kernel gave a right answer at n = {n}")
    return found


def replay_us(calls: Sequence[Call]) -> float:
    """Microseconds per call, median over replays of one graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    taken = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / len(calls))
    return float(np.median(taken))


def read_bandwidth() -> float:
    """Bytes per second of a reduction over 1 GiB."""
    block = torch.randn(1 << 28, device="cuda")
    return block.nbytes / (replay_us([block.sum] * 5) * 1e-6)

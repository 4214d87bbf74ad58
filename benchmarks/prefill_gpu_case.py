"""Case ``prefill-gpu``: a prompt's causal attention on the GPU, over sampled keys and dense, replayed from CUDA graphs.

``select_ms`` draws the keys that blocks of rows share (`gpu.block_sampled`), ``attend_ms`` attends to them
(`gpu.listed`), ``total_ms`` is a graph of both; medians, ``spread_ms`` between the total's quartiles.  Dense kernels
run on the same tensors: cuDNN's and flash's of torch, FlashAttention-3 where installed; from LONG tokens on only the
fastest of the length before, once.  ``flex-blocks`` is torch's FlexAttention over random blocks of the same density,
which nothing chose: its time is all it shows.  ``attend_tflops`` counts 4 d for a row and a key that it attends to.

Errors are relative, over SAMPLE rows of every head beside exact attention; ``kept_mass`` is the share of their
probability on keys of the list or the band, whatever their weights.  ``peak_gb`` is all that the process held while it
drew and attended once, tensors of the prompt included.

Prompts are synthetic, spectra and means as in `benchmarks.decode_gpu_case`, with queries that turn slowly along the
prompt; or SmolLM2's of one layer, where the model is or HSR_HEADS names a file of whole prompts
(`benchmarks.real_keys`).  The gate: lists of everything, and a density of 1, are dense attention.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from attention.key_lists import ROWS, KeyLists, edges
from benchmarks import decode_gpu_case, real_keys
from benchmarks.dense_prefill import KERNELS, Flex, diagonal_pairs
from benchmarks.gate import WrongAnswer
from benchmarks.ledger import Row
from benchmarks.replays import launched, peak_bytes, replayed
from gpu import listed
from gpu.block_sampled import key_lists
from gpu.exact_rows import exact_rows
from hsr import checks

DEVICE = decode_gpu_case.DEVICE
HERE, DTYPE = "cuda", torch.bfloat16
SHAPES = ((32, 8, 128), (14, 2, 64))  # h, g, d
LENGTHS, QUICK_LENGTHS = tuple(1 << k for k in range(12, 20)), (8192,)
SETTINGS = ((0.05, 1), (0.1, 1), (0.1, 2), (0.1, 8))  # density, representatives of a block
LONGEST = ((32, 8, 128), 1 << 20, (0.025, 1))  # measured without a dense kernel
FLEX_LENGTHS = (8192, 32768, 131072)  # each compiles a kernel
REAL_LENGTHS, REAL_LAYER = (8192, 32768), 15
REPEATS, LONG_REPEATS, LONG = 9, 3, 1 << 18
SAMPLE = 256  # rows of a head whose errors are measured
EXACT, EXACT_ROW = 8e-3, 4e-2  # largest relative errors of attention over all keys, mean and of any row
GATE = 5 * ROWS + 77  # tokens of the gate
SEED = 1
STEP = 256  # rows between which queries turn from one direction to the next
STEADY = 0.7  # of the variance that turns; the rest is new in every row
EMPTY: Row = dict.fromkeys(
    "data h g d n method density realised select_ms attend_ms total_ms spread_ms dense_best dense_best_ms speedup "
    "rel_err kept_mass attend_tflops dense_tflops dense_ms peak_gb".split()
)

Milliseconds = dict[str, float]  # of dense kernels by name


class Prompt(NamedTuple):
    """One layer's tensors, B = 1."""

    q: torch.Tensor  # (1, h, n, d)
    k: torch.Tensor  # (1, g, n, d)
    v: torch.Tensor  # (1, g, n, d)

    @property
    def head(self) -> Row:
        """What a row says of it."""
        h, n, d = self.q.shape[1:]
        return {"h": h, "g": self.k.shape[1], "d": d, "n": n}

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.q.shape[3] ** -0.5


class Sample(NamedTuple):
    """Some rows of every head and exact attention to all keys."""

    rows: torch.Tensor  # (h, s) int64
    output: torch.Tensor  # (h, s, d) float32
    lse: torch.Tensor  # (h, s) float32

    def errors(self, output: torch.Tensor) -> torch.Tensor:
        """Relative errors (h, s) of outputs (1, h, n, d)."""
        return (self._of(output[0]).float() - self.output).norm(dim=2) / self.output.norm(dim=2)

    def error(self, output: torch.Tensor) -> float:
        """Their mean."""
        return float(self.errors(output).mean())

    def masses(self, lse: torch.Tensor) -> torch.Tensor:
        """Shares (h, s) of the probability that rows with log-sum-exps (1, h, n) kept."""
        return (self._of(lse[0]) - self.lse).exp()

    def _of(self, part: torch.Tensor) -> torch.Tensor:
        return part[torch.arange(len(part), device=part.device)[:, None], self.rows]


def missing() -> str | None:
    """What this case needs and has not."""
    return None if torch.cuda.is_available() else "prefill-gpu needs an NVIDIA GPU, and torch and triton built for it"


def options(parser: argparse.ArgumentParser) -> None:
    """What this case can be asked for."""
    parser.add_argument(
        "--tokens", nargs="+", type=int, help=f"of synthetic prompts ({LENGTHS[0]} to {LENGTHS[-1]}, and {LONGEST[1]})"
    )


def rows(quick: bool, note: Callable[[str], None], tokens: Sequence[int] | None = None) -> Iterator[Row]:
    """A row per prompt and setting; what fails is a note, and the next prompt follows."""
    for n in tokens or ():
        checks.whole("tokens", n, ROWS, LONGEST[1])
    lengths = QUICK_LENGTHS if quick else LENGTHS if tokens is None else sorted({*tokens} - {LONGEST[1]})
    for shape in SHAPES:
        gate(*shape)
    for shape in SHAPES:
        best: str | None = None
        for n in lengths:
            prompt = _tried(f"a prompt of n = {n} at {shape}", note, partial(made, *shape, n))
            dense: Milliseconds = {}
            yield from compared("synthetic", prompt, dense, note, best if n >= LONG else None)
            best = fastest(dense) or best
            del prompt
    if quick:
        return
    yield from _real(note)
    shape, n, setting = LONGEST
    if tokens is None or n in tokens:
        prompt = _tried(f"a prompt of n = {n}", note, partial(made, *shape, n))
        yield from ours("synthetic", prompt, setting, {}, note)


def _real(note: Callable[[str], None]) -> Iterator[Row]:
    """Of every length, or of a file that has one."""
    path, dtype = real_keys.kept(), str(DTYPE).removeprefix("torch.")
    lacking = None if path else real_keys.missing("prefill-gpu")
    if lacking:
        note(f"no real heads: {lacking}")
        return
    reads: list[Callable[[], list[real_keys.Prompt]]] = [
        partial(real_keys.prompts, n, [REAL_LAYER], HERE, dtype) for n in REAL_LENGTHS
    ]
    for read in [partial(real_keys.read_whole, path, HERE, dtype)] if path else reads:
        found = _tried("SmolLM2", note, read)
        prompt = found and Prompt(*(part[None] for part in found[0]))
        yield from compared("smollm2", prompt, {}, note)


def compared(
    data: str, prompt: Prompt | None, dense: Milliseconds, note: Callable[[str], None], only: str | None = None
) -> Iterator[Row]:
    """All rows of a prompt, if there is one; ``dense`` is filled, by one kernel alone if ``only`` names it."""
    exact = prompt and _tried(f"exact rows at {prompt.head}", note, partial(sample, prompt))
    if prompt is None or exact is None:
        return
    for name in KERNELS:
        if only in (None, name):
            ms = _tried(f"{name} at {prompt.head}", note, partial(dense_ms, name, prompt, exact))
            if ms is not None:
                dense[name] = ms
    for setting in SETTINGS:
        yield from ours(data, prompt, setting, dense, note)
    if prompt.q.shape[2] in FLEX_LENGTHS:
        what = f"FlexAttention at {prompt.head}"
        yield from _tried(what, note, partial(flex_rows, data, prompt, exact, dense)) or ()


def _tried(what: str, note: Callable[[str], None], call: Callable[[], Any]) -> Any:
    """What the call returns; None where it fails, for want of memory or of a kernel: then a note says so."""
    try:
        return call()
    except Exception as fault:
        said = str(fault).strip().splitlines() or [""]
        note(f"{what}: {type(fault).__name__}: {said[0][:200]}")
    finally:
        torch.cuda.empty_cache()
    gc.collect()  # what the fault's frames held
    return None


def made(h: int, g: int, d: int, n: int) -> Prompt:
    """Fresh tensors, the same for the same shape; made a head at a time, so that float32 copies are small."""
    random = torch.Generator(HERE).manual_seed(n + d)
    fixed = torch.Generator().manual_seed(d + g)
    spectrum = torch.arange(1, d + 1, device=HERE).float() ** -0.5
    spectrum /= spectrum.square().mean().sqrt()
    turn = torch.linalg.qr(torch.randn(d, d, generator=fixed))[0].to(HERE)
    means = torch.randn(g, d, generator=fixed).to(HERE)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=HERE, generator=random)

    place = torch.arange(n, device=HERE).float()[:, None] / STEP
    first = place.long()
    to = place - first
    from_ = 1 - to
    norm = (to.square() + from_.square()).sqrt()
    prompt = Prompt(*(torch.empty(1, heads, n, d, dtype=DTYPE, device=HERE) for heads in (h, g, g)))
    for i in range(g):
        prompt.k[0, i] = (normal(n, d) * spectrum) @ turn + means[i]
        prompt.v[0, i] = normal(n, d) + 0.5
    for i in range(h):
        marks = normal(n // STEP + 2, d)
        slow = (from_ * marks[first[:, 0]] + to * marks[first[:, 0] + 1]) / norm
        rows = normal(1, d) + STEADY**0.5 * slow + (1 - STEADY) ** 0.5 * normal(n, d)
        prompt.q[0, i] = 0.9 * ((rows * spectrum.sqrt()) @ turn)
    return prompt


def sample(prompt: Prompt) -> Sample:
    """SAMPLE random rows of every head."""
    h, n = prompt.q.shape[1:3]
    random = torch.Generator(HERE).manual_seed(SEED)
    chosen = torch.randint(n, (h, SAMPLE), device=HERE, generator=random)
    output, lse = exact_rows(*prompt, chosen.cpu().numpy(), prompt.scale)
    return Sample(chosen, output[0].float(), lse[0])


def gate(h: int, g: int, d: int) -> None:
    """Exact rows, lists of everything and a density of 1 must be dense attention, at an odd length."""
    n = GATE
    prompt = made(h, g, d, n)
    k, v = (part[0].double().repeat_interleave(h // g, 0) for part in prompt[1:])
    scores = prompt.q[0].double() @ k.mT * prompt.scale
    hidden = torch.ones(n, n, dtype=torch.bool, device=HERE).triu(1)
    wanted = scores.masked_fill_(hidden, -torch.inf).softmax(2) @ v
    rows = torch.arange(n, device=HERE).expand(h, n)
    exact = Sample(rows, wanted.float(), scores.logsumexp(2).float())
    found = {"exact rows": exact_rows(*prompt, rows.cpu().numpy(), prompt.scale)}
    for name, lists in (("lists of everything", everything(h, n)), ("density 1", drawn(prompt, 1.0, 8))):
        found[name] = listed.attend(*prompt, lists, prompt.scale)
    for name, (output, lse) in found.items():
        error, worst = exact.error(output), float(exact.errors(output).max())
        off = float((exact.masses(lse) - 1).abs().max())
        if not (error < EXACT and max(worst, off) < EXACT_ROW):
            raise WrongAnswer(
                f"{name} at {(h, g, d)}: outputs are off by {error:.2e} on average and {worst:.2e} at most, sums of "
                f"weights by {off:.2e}"
            )


def everything(h: int, n: int) -> KeyLists:
    """Every eligible key on every line."""
    lines = np.tile(edges(n, n), h)
    tokens = np.concatenate([np.arange(edge, dtype=np.int32) for edge in lines])
    offsets = np.concatenate([[0], np.cumsum(lines)])
    return KeyLists(torch.from_numpy(offsets).to(HERE), torch.from_numpy(tokens).to(HERE))


def drawn(prompt: Prompt, density: float, rows: int) -> KeyLists:
    """Our selection."""
    return key_lists(*prompt, density=density, rows=rows, causal_selection=False, seed=SEED, scale=prompt.scale)


def repeats(n: int) -> int:
    """How often a length is measured."""
    return REPEATS if n < LONG else LONG_REPEATS


def dense_ms(name: str, prompt: Prompt, exact: Sample) -> float:
    """Of a dense kernel whose answer is right; at great lengths it runs twice in all."""
    attend = KERNELS[name](*prompt)
    error = exact.error(attend())
    if not error < EXACT:
        raise WrongAnswer(f"outputs are off by {error:.2e}")
    timing = replayed(attend, REPEATS) if prompt.q.shape[2] < LONG else launched(attend, 1)
    return timing.median * 1e3


def fastest(dense: Milliseconds) -> str | None:
    """The name of the fastest kernel."""
    return min(dense, key=lambda name: dense[name], default=None)


def ours(
    data: str, prompt: Prompt | None, setting: tuple[float, int], dense: Milliseconds, note: Callable[[str], None]
) -> Iterator[Row]:
    """One row, unless there is no prompt or something fails."""
    found = prompt and _tried(f"{setting} at {prompt.head}", note, partial(_measured, prompt, *setting))
    if prompt is not None and found is not None:
        yield _row(data, prompt, dense, found | {"method": f"sampled-{setting[1]}", "density": setting[0]})


def _measured(prompt: Prompt, density: float, representatives: int) -> Row:
    """Errors, then times."""
    h, n, d = prompt.q.shape[1:]
    select = partial(drawn, prompt, density, representatives)
    lists = select()
    attend = partial(listed.attend, *prompt, lists, prompt.scale)
    exact = sample(prompt)
    error = exact.error(attend()[0])
    if not error < 1:
        raise WrongAnswer(f"outputs are off by {error:.2e}")
    plain = KeyLists(lists.token_offsets, lists.tokens)
    mass = float(exact.masses(listed.attend(*prompt, plain, prompt.scale)[1]).mean())
    pairs = int(lists.token_offsets[-1]) * ROWS + h * diagonal_pairs(n)
    realised = float(lists.densities(n, n).mean())
    del plain
    attending = replayed(attend, repeats(n)).median
    del lists, attend

    def both() -> None:
        listed.attend(*prompt, select(), prompt.scale)

    peak = peak_bytes(both)
    selecting, total = replayed(select, repeats(n)).median, replayed(both, repeats(n))
    return {
        "realised": realised,
        "select_ms": selecting * 1e3,
        "attend_ms": attending * 1e3,
        "total_ms": total.median * 1e3,
        "spread_ms": total.spread * 1e3,
        "rel_err": error,
        "kept_mass": mass,
        "attend_tflops": 4e-12 * d * pairs / attending,
        "peak_gb": peak / 1e9,
    }


def flex_rows(data: str, prompt: Prompt, exact: Sample, dense: Milliseconds) -> list[Row]:
    """A row per density, once all blocks have given dense attention."""
    d = prompt.q.shape[3]
    flex = Flex(*prompt)
    error = exact.error(flex.over(flex.mask(1.0)[0]))
    if not error < EXACT:
        raise WrongAnswer(f"over all blocks it is off by {error:.2e}")
    found = []
    for density in dict.fromkeys(density for density, _ in SETTINGS):
        mask, pairs = flex.mask(density)
        call = partial(flex.over, mask)
        call()
        timing = launched(call, REPEATS)
        measured = {
            "method": "flex-blocks",
            "density": density,
            "attend_ms": timing.median * 1e3,
            "total_ms": timing.median * 1e3,
            "spread_ms": timing.spread * 1e3,
            "attend_tflops": 4e-12 * d * pairs / timing.median,
        }
        found.append(_row(data, prompt, dense, measured))
    return found


def _row(data: str, prompt: Prompt, dense: Milliseconds, found: Row) -> Row:
    """A whole row: what was found, beside the dense kernels."""
    h, n, d = prompt.q.shape[1:]
    beside: Row = {}
    best = fastest(dense)
    if best is not None:
        ms = dense[best]
        beside = {
            "dense_best": best,
            "dense_best_ms": ms,
            "speedup": ms / float(str(found["total_ms"])),
            "dense_tflops": 4e-9 * d * h * n * (n + 1) / 2 / ms,
            "dense_ms": dense,
        }
    return EMPTY | {"data": data} | prompt.head | found | beside

"""Case ``long-decode``: thousands of steps through one session, each an append and an attend.

The cache is that of `benchmarks.decode_cpu_case`: PROMPT tokens are there at first, and STEPS more are appended one by
one.  A row tells of a window of steps that ends with ``n`` tokens: milliseconds of an append and attend, the mean
relative error against float64 at its end, and memory: of the process beyond what it held before the session, and of
the cache itself, n keys and values in the session's own dtype.  The sampled policy's eps is one that kept the error
within 1 % in case ``decode-cpu``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from attention import Certified, DecodeSession, Policy, Sampled
from benchmarks import real_keys
from benchmarks.decode_cpu_case import ASKED, QUICK_TEXT, SHAPES, TEXT, assembled, exact_outputs, known_positions
from benchmarks.ledger import MILLI, Row

PROMPT, QUICK_PROMPT = 8192, 256
STEPS, QUICK_STEPS = 4096, 128
WINDOWS = 8
POLICIES: dict[str, Policy | Sampled] = {
    "sampled-32B": Sampled(eps=0.02, bytes_per_key=32),
    "certified-coded": Certified(eps=0.3, bytes_per_key=64),
}
STATUS = Path("/proc/self/status")
MIB = 2**20

missing = partial(real_keys.missing, "long-decode")


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """One row per shape, policy and window of steps."""
    tokens, prompt, steps = (QUICK_TEXT, QUICK_PROMPT, QUICK_STEPS) if quick else (TEXT, PROMPT, STEPS)
    layers = real_keys.layers(tokens, known_positions(tokens))
    if resident() is None:
        note(f"memory is not measured: this system has no {STATUS}")
    for name, shape in SHAPES.items():
        cache = assembled(layers, shape, prompt + steps, np.random.default_rng(prompt))
        for policy, setting in POLICIES.items():
            before = resident()
            session = DecodeSession(
                cache.keys[:, :prompt], cache.values[:, :prompt], policy=setting, queries=cache.known
            )
            session.attend(cache.queries[:, :1])
            for first in range(prompt, prompt + steps, steps // WINDOWS):
                n, taken = first + steps // WINDOWS, []
                for j in range(first, n):
                    start = time.perf_counter()
                    session.append(cache.keys[:, j : j + 1], cache.values[:, j : j + 1])
                    session.attend(cache.queries[:, j % ASKED :][:, :1])
                    taken.append(time.perf_counter() - start)
                keys, values = cache.keys[:, :n], cache.values[:, :n]
                output = np.concatenate([session.attend(cache.queries[:, i : i + 1]).output for i in range(ASKED)], 1)
                wanted = exact_outputs(cache.queries, keys, values)
                errors = np.linalg.norm(output - wanted, axis=2) / np.linalg.norm(wanted, axis=2)
                low, median, high = np.percentile(taken, [25, 50, 75])
                now = resident()
                yield {
                    "shape": name,
                    "policy": policy,
                    "setting": repr(setting),
                    "n": n,
                    "ms": median * MILLI,
                    "spread": (high - low) * MILLI,
                    "slowest_ms": max(taken) * MILLI,
                    "rel_err": float(errors.mean()),
                    "memory_mib": None if before is None or now is None else (now - before) / MIB,
                    "cache_mib": (keys.nbytes + values.nbytes) / MIB,
                }


def resident() -> int | None:
    """Bytes of this process in memory; None where the system does not say."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024

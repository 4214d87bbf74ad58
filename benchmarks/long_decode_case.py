"""Case ``long-decode``: thousands of steps through one session, each an append and an attend.

The cache is that of `benchmarks.decode_cpu_case`: PROMPT tokens are there at first, and STEPS more are appended one by
one.  A row tells of a window of steps that ends with ``n`` tokens: milliseconds of an append and attend, the mean
relative error against float64 at its end, and memory: of all arrays that the session holds, with the room in them for
more keys, and of the n keys and values themselves.  ``rate_ms`` is the mean over the window, new fits of the coder and
copies into larger arrays included.  The sampled policy's eps is near what case ``decode-cpu`` needs for an error
of 1 %.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, ModuleType

import numpy as np

from attention import DecodeSession, Sampled
from benchmarks import real_keys
from benchmarks.decode_cpu_case import ASKED, QUICK_TEXT, SHAPES, TEXT, assembled, exact_outputs, known_positions
from benchmarks.ledger import MILLI, Row

PROMPT, QUICK_PROMPT = 8192, 256
STEPS, QUICK_STEPS = 4096, 128
WINDOWS = 8
POLICIES = {"llama-3.1-8b": Sampled(eps=0.02), "smollm2-135m": Sampled(eps=0.0125)}
MIB = 2**20

missing = partial(real_keys.missing, "long-decode")


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """One row per shape, policy and window of steps."""
    tokens, prompt, steps = (QUICK_TEXT, QUICK_PROMPT, QUICK_STEPS) if quick else (TEXT, PROMPT, STEPS)
    layers = real_keys.layers(tokens, known_positions(tokens))
    for name, shape in SHAPES.items():
        cache = assembled(layers, shape, prompt + steps, np.random.default_rng(prompt))
        keys, values, policy = cache.keys[:, :prompt], cache.values[:, :prompt], POLICIES[name]
        session = DecodeSession(keys, values, policy=policy, queries=cache.known)
        session.attend(cache.queries[:, :1])
        for first in range(prompt, prompt + steps, steps // WINDOWS):
            n, taken = first + steps // WINDOWS, []
            for j in range(first, n):
                start = time.perf_counter()
                session.append(cache.keys[:, j : j + 1], cache.values[:, j : j + 1])
                session.attend(cache.queries[:, j % ASKED :][:, :1])
                taken.append(time.perf_counter() - start)
            keys, values = cache.keys[:, :n], cache.values[:, :n]
            output = np.concatenate([session.attend(cache.queries[:, i : i + 1]).output for i in range(ASKED)], axis=1)
            exact = exact_outputs(cache.queries, keys, values)
            errors = np.linalg.norm(output - exact, axis=2) / np.linalg.norm(exact, axis=2)
            low, median, high = np.percentile(taken, [25, 50, 75])
            yield {
                "shape": name,
                "policy": repr(policy),
                "n": n,
                "ms": median * MILLI,
                "spread": (high - low) * MILLI,
                "rate_ms": float(np.mean(taken)) * MILLI,
                "slowest_ms": max(taken) * MILLI,
                "rel_err": float(errors.mean()),
                "session_mib": held(session) / MIB,
                "cache_mib": (keys.nbytes + values.nbytes) / MIB,
            }


def held(root: object) -> int:
    """Bytes of all arrays that an object holds, each counted once."""
    total, seen, stack = 0, set(), [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray) and not isinstance(item.base, np.ndarray):
            total += item.nbytes
        stack += [item.base] if isinstance(item, np.ndarray) else gc.get_referents(item)
    return total

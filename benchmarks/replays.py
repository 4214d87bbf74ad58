"""Device time and memory of a call on the GPU, replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import Timing

Call = Callable[[], object]


def replayed(call: Call, repeats: int) -> Timing:
    """Seconds of a call that has run before: median over replays, after one that does not count if there are several.

    What the call allocates is the graph's own, and gone when this returns.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    if repeats > 1:
        graph.replay()
    found = _timing(graph.replay, repeats)
    del made
    graph.reset()
    return found


def launched(call: Call, repeats: int) -> Timing:
    """Likewise without a graph: of a call that takes far longer than its launch, or that no graph can hold."""
    return _timing(call, repeats)


def _timing(call: Call, repeats: int) -> Timing:
    taken = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    low, median, high = np.percentile(taken, [25, 50, 75])
    return Timing(float(median), float(high - low))


def peak_bytes(call: Call) -> int:
    """Bytes that the process held on the device at most while the call ran."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())

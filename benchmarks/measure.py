"""The clock: contenders take turns, so that a slow minute of the machine falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Call = Callable[[int], object]  # the i-th piece of work; asking for it again repeats it

PROBE = 0.2  # seconds that finding out the rough cost of a call may take
ROUND = 0.05  # seconds that a timed round lasts at least
PAUSE = 0.05  # seconds before a round: idle BLAS and OpenMP threads spin for a while and would slow the next contender


@dataclass(frozen=True)
class Timing:
    """Seconds per call over several rounds."""

    median: float
    spread: float  # between the quartiles


def seconds(call: Call) -> float:
    """Seconds of the fastest of up to ten calls, after one that is not timed; fewer once they have taken PROBE."""
    call(0)
    taken: list[float] = []
    while len(taken) < 10 and sum(taken) < PROBE:
        start = time.perf_counter()
        call(0)
        taken.append(time.perf_counter() - start)
    return min(taken)


def take_turns(
    contenders: Mapping[str, Call], pieces: int, repeats: int, *, shortest: float = ROUND, pause: float = PAUSE
) -> dict[str, Timing]:
    """Time every contender ``repeats`` times, one round each in turn.

    Args:
        contenders: name -> call.
        pieces: a round calls ``call(0) .. call(pieces - 1)``, again and again until ``shortest`` has passed.
        repeats: rounds per contender.
        shortest: seconds.
        pause: seconds of rest before each round, which begins with one call that is not timed.
    """
    passes = {name: 1 + int(shortest / (pieces * max(seconds(call), 1e-9))) for name, call in contenders.items()}
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            time.sleep(pause)
            call(0)
            start = time.perf_counter()
            for _ in range(passes[name]):
                for i in range(pieces):
                    call(i)
            rounds[name].append((time.perf_counter() - start) / (passes[name] * pieces))
    return {name: _timing(found) for name, found in rounds.items()}


def _timing(found: list[float]) -> Timing:
    low, median, high = np.percentile(found, [25, 50, 75])
    return Timing(float(median), float(high - low))


def each(call: Call, pieces: int, *, rounds: int, budget: float, pause: float = PAUSE) -> np.ndarray:
    """Seconds (pieces,) of each piece of work on its own: the fastest of up to ``rounds`` times.

    Rounds go over all pieces in turn, after one call that is not timed, and end early once they have taken ``budget``
    seconds together.
    """
    best = np.full(pieces, np.inf)
    time.sleep(pause)
    call(0)
    begin = time.perf_counter()
    for _ in range(rounds):
        for i in range(pieces):
            start = time.perf_counter()
            call(i)
            best[i] = min(best[i], time.perf_counter() - start)
        if time.perf_counter() - begin > budget:
            break
    return best

"""Algorithm 3 of arXiv 2410.10165: build the index inside the call, then answer every row of the prompt."""

from __future__ import annotations

from typing import Any

from attention.engine import Plan, fold, prompt_limits
from attention.policies import Policy
from attention.result import Result, joined
from attention.sampled import Sampled
from attention.shared_prompt import Shared, attend_prompt
from attention.values import Values
from attention.weights import ReLUPower, Softmax
from hsr import checks
from hsr.backend import preferred
from hsr.errors import ArgumentError

PAIRS = 1 << 24  # (row, key) pairs attended at a time, over all heads: bounds the memory of a report


def prefill(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    weight: Softmax | ReLUPower = Softmax(),  # noqa: B008 - frozen
    policy: Policy | Sampled | Shared | None = None,
    scale: float | None = None,
    method: str = "auto",
) -> Result:
    """Attention of a prompt's rows over its keys.

    Args:
        q: (h, m, d) or (B, h, m, d); on a GPU for what a row ``prompt`` of the table serves, see `gpu.prompt`.
        k: (g, n, d) or (B, g, n, d), h a multiple of g.
        v: (g, n, dv) or (B, g, n, dv).
        causal: row i sees the keys up to ``i + n - m`` (bottom-right aligned, so m < n continues a cached prefix).
        weight: as for `decode`.
        policy: as for `decode`; or, for causal prompts, one whose rows share keys: BlockSampled(...), Listed(lists),
            SkipSoftmax(...) or a selector of `attention.selectors`.
        scale: as for `decode`.
        method: index method, a name of the dispatch table or "auto"; for BlockSampled
            and SkipSoftmax, a method of their operations.

    Returns:
        Result: output (h, m, dv) or (B, h, m, dv) with log-sum-exp, certificate and counters.

    Raises:
        ArgumentError: as for `decode`; also causal with m > n, whose first rows would see no key.
    """
    device = checks.device(q)
    if device != "cpu":
        if method != "auto":
            raise ArgumentError(f"method must be 'auto' on {device}, where the table chooses; got {method!r}")
        run = preferred("prompt", device=device, policy=policy, weight=weight, causal=causal)
        answer: Result = run(q, k, v, policy, scale)
        return answer
    if isinstance(policy, Shared):
        return attend_prompt(policy, q, k, v, causal=causal, weight=weight, scale=scale, method=method)
    plan = Plan(weight, policy, scale)
    queries, keys, values = fold("q", q), fold("k", k), fold("v", v)
    limits = prompt_limits(q, k, causal)
    index, kept = plan.index(keys, method), Values(values)
    heads, m = limits.shape
    step = max(1, PAIRS // (heads * index.n))
    blocks = [slice(first, first + step) for first in range(0, max(m, 1), step)]
    return joined([plan.attend(queries[:, rows], index, kept, limits[:, rows]) for rows in blocks]).shaped(
        q.shape[:-1], q
    )

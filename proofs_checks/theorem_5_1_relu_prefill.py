"""Theorem 5.1: ReLU attention of a whole prompt over reported keys is exact, ``O(m n^(1 - 1/floor(d/2)) + m n^(4/5))``.

Source. arXiv 2410.10165, Theorem 5.1. As we understand it, the paper states: for m = Theta(n), Algorithm 3 (build the
index inside the call, then one query per row) computes the ReLU attention without error in ``O(m n^(1 - 1/floor(d/2))
+ m n^(4/5))`` up to factors of d, with probability at least 1 - delta (Lemma 6.1).

Hypotheses. Exactness: any finite inputs, with or without a causal mask, as many rows as keys or fewer. Cost: Gaussian
inputs, b at which n^(4/5) keys fire on average.

Conclusion. (i) Each row is the ReLU attention over the keys it sees, and reports as many as `attention.decode` does
over those keys alone. (ii) The rows attend to at most ``2 m n^(4/5)`` keys in all.

Proof. Row by row Theorem 4.1, with one build (Corollary 3.1, part 1). A causal row restricts the report to a prefix
of the keys, which changes the output of no other row.

Check. (i) Lattice inputs, exact rationals (Definition 1.2). (ii) m = n = 1024, d = 16, no mask; the constants are
attended keys over ``m n^(4/5)`` and keys read at full precision over attended keys.

What this does not show. The time: the term ``n^(1 - 1/floor(d/2))`` belongs to a structure that is not built here
(`corollary_3_1_part_1`), and a restriction to a prefix does not make the search visit fewer codes or boxes than its
structure has in that prefix.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from scipy.stats import norm

from attention import ReLUPower
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.definition_1_2_relu import assert_relu_row
from proofs_checks.inputs import Prompt, prompts
from proofs_checks.rationals import exact, relu_weights
from proofs_checks.routes import PREFILL_FAULTS, Prefill, by_decode, prefilled


def conclude(prefill: Prefill, examples: int) -> dict[str, float]:
    """Rows against exact rationals and against decode, then the number of keys attended."""
    met = Extremes()

    def conclusion(case: tuple[Prompt, ReLUPower]) -> None:
        prompt, weight = case
        problem = prompt.problem
        q, k, v = problem.floats
        found = prefill(q, k, v, prompt.causal, weight, None, problem.method)
        for i in range(len(q)):
            seen = prompt.visible(i)
            weights = relu_weights(problem.scores(i)[:seen], exact(weight.b).item(), weight.alpha)
            error = assert_relu_row(found.output[i], found.lse[i], weights, problem.values[:seen])
            met.largest("output error / (u max|V|)", error)
        i = len(q) // 2
        alone = by_decode(q[i : i + 1], k[: prompt.visible(i)], v[: prompt.visible(i)], weight, "brute")
        assert found.reported[i] == alone.reported[0], (
            f"row {i} reports {found.reported[i]}, decode {alone.reported[0]}"
        )

    b = st.sampled_from((-1.0, 0.0, 0.25, 4.0))
    for_all(st.tuples(prompts(), st.builds(ReLUPower, st.integers(1, 3), b)), conclusion, examples)
    rng = np.random.default_rng(0)
    n = 1024
    q, k, v = (rng.standard_normal((n, 16)) for _ in range(3))
    found = prefill(q, k, v, False, ReLUPower(1, float(norm.isf(n**-0.2))), None, "sketch")
    attended = int(found.reported.sum())
    assert attended <= 2 * n * n**0.8, f"{attended} keys attended by {n} rows"
    met["attended keys / (m n^(4/5))"] = attended / n**1.8
    met["keys read / attended"] = float(found.scanned.sum() / attended)
    return met


CHECK = Check(
    statement="Theorem 5.1: ReLU prefill is exact",
    source=PAPER,
    evidence="exact rationals; counts measured",
    conclude=conclude,
    operations={"attention.prefill": prefilled},
    faults=PREFILL_FAULTS,
)

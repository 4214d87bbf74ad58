"""Theorem 5.2: softmax of a whole prompt over each row's n^(4/5) best keys, error as in Theorem 4.3.

Source. arXiv 2410.10165, Theorem 5.2. As we understand it, the paper states: for m = Theta(n), Algorithm 3 computes
each row's index-set softmax over R = NN(n^(4/5), q, K) in ``O(m n^(1 - 1/floor(d/2)) + m n^(4/5))`` up to factors of
d.

Hypotheses. Any finite inputs, with or without a causal mask, as many rows as keys or fewer. Under a causal mask n is
the number of keys that the row sees.

Conclusion. (i) Row i, which sees n_i keys, is the index-set softmax over ceil(n_i^(4/5)) of them, none of which
scores below one left out. (ii) Reported are exactly that many, so the rows attend to at most ``m (n^(4/5) + 1)``
keys.

Proof. Row by row Theorem 4.2, with one build (Corollary 3.1, part 1).

Check. The values are the unit vectors, so that the output shows each row's weights; Theorem 4.2's own assertion is
applied to every row. (ii) m = n = 512, causal; the constants are attended keys over ``m n^(4/5)``, which tends to
1/1.8 = 0.56 under the mask, and keys read at full precision over attended keys.

What this does not show. The time, as for Theorem 5.1; and that n^(4/5) keys are enough: the error is Theorem 4.3's,
and for diffuse rows large.
"""

from __future__ import annotations

import numpy as np

from attention import Softmax, TopR
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.inputs import Prompt, prompts
from proofs_checks.routes import PREFILL_FAULTS, Prefill, prefilled
from proofs_checks.theorem_4_2_index_set_softmax import assert_index_set_softmax, four_fifths


def conclude(prefill: Prefill, examples: int) -> dict[str, float]:
    """Every row's index set and weights, then the number of keys attended."""
    met = Extremes()

    def conclusion(prompt: Prompt) -> None:
        problem = prompt.problem
        q, k, _ = problem.floats
        found = prefill(q, k, np.eye(len(k)), prompt.causal, Softmax(), TopR(), problem.method)
        for i in range(len(q)):
            seen = prompt.visible(i)
            weights, r = found.output[i], four_fifths(seen)
            assert not weights[seen:].any(), f"row {i} gives weight to keys beyond the first {seen}"
            error = assert_index_set_softmax(weights[:seen], problem.scores(i)[:seen], r)
            met.largest("weight error / u", error)
            assert found.reported[i] == r

    for_all(prompts(), conclusion, examples)
    rng = np.random.default_rng(0)
    n = 512
    q, k, v = (rng.standard_normal((n, 16)) for _ in range(3))
    found = prefill(q, k, v, True, Softmax(), TopR(), "sketch")
    attended = int(found.reported.sum())
    assert attended <= n * (n**0.8 + 1)
    met["attended keys / (m n^(4/5))"] = attended / n**1.8
    met["keys read / attended"] = float(found.scanned.sum() / attended)
    return met


CHECK = Check(
    statement="Theorem 5.2: softmax prefill over each row's best keys",
    source=PAPER,
    evidence="whole numbers and 60 digits; counts measured",
    conclude=conclude,
    operations={"attention.prefill, TopR": prefilled},
    faults=PREFILL_FAULTS,
)

"""Compositional attention: S searches, each paired with the best of R retrievals by a second softmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from attention.modules.arguments import finite, host, share, tensor
from attention.policies import Policy
from attention.prefill import prefill
from attention.result import Result
from attention.sampled import Sampled
from attention.session import DecodeSession
from hsr import checks


class CompositionalAttention(nn.Module):
    """S searches x R retrievals, any of which may be paired: attention whose heads do not own their values.

    With ``A_s = softmax(Q_s K_s^T / sqrt(d))`` every search reads every retrieval, ``O_{s,r} = A_s V_r``, and chooses
    among them by ``softmax_r <q_s, k_{s,r}> / sqrt(d_r)`` with q_s from the input and k_{s,r} from O_{s,r}, by one
    matrix that all pairs share.  The chosen mixtures are concatenated and projected.

    A search depends on Q_s and K_s alone, so that half-space reporting can serve it: `sparse` for prompts, `session`
    for decoding, with the R values side by side as one value, each search run once.  With ``Dense()`` they give the
    rows of `forward`; with another policy the searches carry its certificate, and `Composed.error` what that means
    after the second softmax.

    Published code differs: it has biases in the second softmax, dropout, and a linear score beside the dot product.

    Args:
        width: of an input x; each value has ``width / searches`` numbers.
        searches: S, at least 1.
        retrievals: R, at least 1.
        search_width: d, of Q_s and K_s; None means ``width / searches``.
        retrieval_width: d_r, of the second softmax; None likewise.
        dtype: float32 or float64.

    Raises:
        ArgumentError: a number out of range, a width that S does not divide.

    Source: arXiv 2110.09419; sarthmit/Compositional-Attention.

    Example:
        >>> import torch
        >>> from attention import Dense
        >>> from attention.modules import CompositionalAttention
        >>> layer = CompositionalAttention(16, searches=4, retrievals=3, search_width=8, dtype=torch.float64)
        >>> x = torch.randn(2, 30, 16, dtype=torch.float64)
        >>> session = layer.session(x[:, :29], policy=Dense())
        >>> found = session.step(x[:, 29:])
        >>> bool(torch.allclose(found.output, layer(x, causal=True)[:, 29:])), found.searches.certificate.kind
        (True, 'exact')
    """

    def __init__(
        self,
        width: int,
        searches: int,
        retrievals: int,
        *,
        search_width: int | None = None,
        retrieval_width: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.searches, self.retrievals = (
            checks.whole("searches", searches, 1),
            checks.whole("retrievals", retrievals, 1),
        )
        self.width, self.value_width = width, share("width", width, "searches", self.searches)
        self.search_width = _width("search_width", search_width, self.value_width)
        self.retrieval_width = _width("retrieval_width", retrieval_width, self.value_width)
        self.dtype = dtype
        self.query = nn.Linear(width, self.searches * self.search_width, bias=False, dtype=dtype)
        self.key = nn.Linear(width, self.searches * self.search_width, bias=False, dtype=dtype)
        self.value = nn.Linear(width, self.retrievals * self.value_width, bias=False, dtype=dtype)
        self.retrieval_query = nn.Linear(width, self.searches * self.retrieval_width, bias=False, dtype=dtype)
        self.retrieval_key = nn.Linear(self.value_width, self.retrieval_width, bias=False, dtype=dtype)
        self.out = nn.Linear(self.searches * self.value_width, width, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """x (B, T, width) -> (B, T, width), dense; what to train.

        Raises:
            ArgumentError: another shape or dtype, B or T = 0, NaN or infinity; a GPU is waited for.
        """
        q, k, v = self.parts(x)
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self._composed(x, found)[0]

    def sparse(
        self,
        x: torch.Tensor,
        *,
        causal: bool = False,
        policy: Policy | Sampled | None = None,
    ) -> Composed:
        """x (B, T, width), on the CPU -> `forward` with each search by `attention.prefill`, without gradients.

        Raises:
            ArgumentError: as for `forward` and `attention.prefill`.
        """
        host("x", x)
        with torch.no_grad():
            return self.composed(x, prefill(*self.parts(x), causal=causal, policy=policy))

    def session(self, x: torch.Tensor, *, policy: Policy | Sampled | None = None, method: str = "auto") -> Searches:
        """A cache of the tokens x (B, n, width), on the CPU, for decoding; ``policy`` and ``method`` as for a session.

        Raises:
            ArgumentError: as for `forward` and `attention.DecodeSession`.
        """
        return Searches(self, x, policy, method)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, width) -> q, k (B, S, T, d), v (B, S, T, R dv): every search sees the same values, one view.

        Raises:
            ArgumentError: as for `forward`.
        """
        finite("x", tensor("x", x, "B", "T", self.width, dtype=self.dtype))
        q, k = (f(x).unflatten(2, (self.searches, -1)).transpose(1, 2) for f in (self.query, self.key))
        return q, k, self.value(x)[:, None].expand(-1, self.searches, -1, -1)

    def composed(self, x: torch.Tensor, found: Result) -> Composed:
        """Tokens x (B, m, width) and what their searches found, (B, S, m, R dv) -> output and a bound on its error."""
        with torch.no_grad():
            output, each = self._composed(x, found.output)
            return Composed(output, found, self._error(x, found, each))

    def _composed(self, x: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, m, width), found (B, S, m, R dv) -> output (B, m, width), and O_{s,r} (B, S, m, R, dv)."""
        each = found.unflatten(3, (self.retrievals, self.value_width))
        q = self.retrieval_query(x).unflatten(2, (self.searches, -1)).transpose(1, 2)
        scores = torch.einsum("bsmd,bsmRd->bsmR", q, self.retrieval_key(each)) / self.retrieval_width**0.5
        mixed = torch.einsum("bsmR,bsmRd->bmsd", scores.softmax(dim=-1), each)
        return self.out(mixed.flatten(2)), each

    def _error(self, x: torch.Tensor, found: Result, each: torch.Tensor) -> np.ndarray:
        """(B, m): a bound on the output's error in the 2-norm, from the certificate of the searches.

        Where a search is off by e, each O_{s,r} is, and each score of the second softmax by at most ``e |W^T q_s| /
        sqrt(d_r) = t``, W the retrieval's key matrix.  Weights then change by a factor in ``exp(+-2 t)``, so that the
        mixture is off by at most ``e + min(2, expm1(2 t)) max_r |O_{s,r}|``; the output matrix has a norm.
        """
        off = found.certificate.output_error
        q = self.retrieval_query(x).unflatten(2, (self.searches, -1)).transpose(1, 2)
        slope = (q @ self.retrieval_key.weight).norm(dim=-1).double().numpy() / self.retrieval_width**0.5
        largest = each.norm(dim=-1).amax(dim=-1).double().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            turned = np.nan_to_num(np.minimum(2.0, np.expm1(2 * off * slope)), nan=2.0)
        mixed = np.sqrt(((off + turned * largest) ** 2).sum(axis=1))  # over searches
        return float(torch.linalg.matrix_norm(self.out.weight, 2)) * mixed


@dataclass(frozen=True)
class Composed:
    """Output of the layer, and what its searches know.

    Attributes:
        output: (B, m, width), like the input; no gradient.
        searches: of the S searches as heads, outputs (B, S, m, R dv) with their certificate and counters.
        error: (B, m) float64; bound on ``||output - exact||_2`` that follows from the certificate's ``output_error``,
            of its kind, and at its confidence for each of the S searches; rounding in the layer's own products is not
            in it.
    """

    output: torch.Tensor
    searches: Result
    error: np.ndarray


class Searches:
    """A growing cache of one layer: `append` tokens, `attend` with tokens that are in it, or `step`, which does both.

    One `DecodeSession` holds the searches' keys as heads; each search keeps its own copy of the R values.
    """

    def __init__(self, layer: CompositionalAttention, x: torch.Tensor, policy: Policy | Sampled | None, method: str):
        host("x", x)
        with torch.no_grad():
            _, k, v = layer.parts(x)
        self._layer, self._batch = layer, len(x)
        self._session = DecodeSession(k, v, policy=policy, method=method)

    @property
    def n(self) -> int:
        """Number of tokens in the cache."""
        return self._session.n

    def append(self, x: torch.Tensor) -> None:
        """Add tokens x (B, t, width); nothing changes if they are refused.

        Raises:
            ArgumentError: a shape or dtype that does not match, NaN or infinity.
        """
        self._session.append(*self._parts(x, "t")[1:])

    def attend(self, x: torch.Tensor) -> Composed:
        """Tokens x (B, m, width), each over the whole cache.

        Raises:
            ArgumentError: a shape or dtype that does not match, NaN or infinity.
        """
        return self._layer.composed(x, self._session.attend(self._parts(x, "m")[0]))

    def step(self, x: torch.Tensor) -> Composed:
        """One more token x (B, 1, width), its output over the cache and itself."""
        q, k, v = self._parts(x, 1)
        self._session.append(k, v)
        return self._layer.composed(x, self._session.attend(q))

    def _parts(self, x: torch.Tensor, count: int | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        host("x", x)
        with torch.no_grad():
            return self._layer.parts(tensor("x", x, self._batch, count, self._layer.width, dtype=self._layer.dtype))


def _width(name: str, value: int | None, otherwise: int) -> int:
    return otherwise if value is None else checks.whole(name, value, 1)

"""A growing cache whose steps attend to the keys that a decode selector lists, on a CPU or a GPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import numpy as np
import torch

from attention.decode_selector import Attended, Bounds
from attention.engine import Plan, Stepwise, fold, is_stepwise
from attention.held_rows import HeldRows
from attention.result import ROUNDING, SMALLEST, Certificate, Counters, Result
from attention.shared_prompt import LARGEST
from attention.token_lists import TokenLists, check_shapes
from hsr import checks
from hsr.backend import choose, preferred
from hsr.errors import ArgumentError


def refuses(*, plan: Plan, **call: object) -> str | None:
    """Why it cannot serve the plan; None if it can."""
    return None if is_stepwise(plan.policy) else "serves decode selectors alone"


class SelectedSession:
    """See `attention.DecodeSession`; one query a head and step, nothing is evicted.

    Of a result's counters, ``reported`` counts keys and means attended to; what is read to choose them the selector's
    ``bytes_read`` says, so that ``scanned`` is the same and ``visited`` 0.

    Certificates are of the kind "none", or what the selector says (`attention.decode_selector.Bounds`).

    On a CPU, float16 and bfloat16 are held as float32, exactly.  On a GPU they stay as they are, d is 64, 128 or 256
    and dv = d; results stay there; appended tokens and queries are not read by the host: NaN or infinity in them gives
    NaN.  ``append`` and ``attend`` never wait for the GPU.

    Args:
        k: (g, n, d) or (B, g, n, d), n >= 1.
        v: (g, n, dv) or (B, g, n, dv).
        plan: whose policy is a decode selector.
        queries: (h, m, d) or (B, h, m, d), the prompt's last ones, for selectors that calibrate; or None.
        method: row of the operation ``chosen`` of the dispatch table, or "auto".

    Raises:
        ArgumentError: shapes or dtypes that do not fit, NaN or infinity; on a CPU values or scores beyond 1e30 in
            float32 and narrower, 1e150 in float64.
        BackendUnavailable: no kernel for this width or dtype.
    """

    def __init__(self, k: Any, v: Any, plan: Plan, queries: Any = None, method: str = "auto") -> None:
        assert isinstance(plan.policy, Stepwise)
        self._policy, self._dtype = plan.policy, checks.dtype_name("k", k)
        self._device = k.device if isinstance(k, torch.Tensor) else torch.device("cpu")
        keys = self._rows("k", k)
        self._leading, self._d, self._dv = tuple(k.shape[:-2]), k.shape[-1], tuple(getattr(v, "shape", (0,)))[-1]
        values = self._values_like("v", v, k)
        if 0 in (*keys.shape, self._dv):
            found = f"{tuple(k.shape)} and {tuple(v.shape)}"
            raise ArgumentError(f"k and v must have heads, tokens and widths of at least 1; got shapes {found}")
        self._scale = 1 / math.sqrt(self._d) if plan.scale is None else float(plan.scale)
        call = {"device": self._device.type, "d": self._d, "dv": self._dv, "dtype": self._dtype}
        self._attend = preferred("chosen", **call) if method == "auto" else choose("chosen", method, **call)
        self._longest = 0.0  # length of a key, on a CPU
        self._check_range(keys, values)
        if self._device.type != "cpu" and not bool(torch.isfinite(keys).all() & torch.isfinite(values).all()):
            raise ArgumentError("k and v must be finite; got NaN or infinity")
        known = None if queries is None else self._queries("queries", queries)
        self._keys, self._values = HeldRows(keys), HeldRows(values)
        self._steps = self._policy.begin(
            self._keys.rows, self._values.rows, known, self._scale, math.prod(self._leading[:-1])
        )

    @property
    def n(self) -> int:
        """Tokens that were added."""
        return self._keys.rows.shape[1]

    @property
    def alive(self) -> int:
        """All of them: nothing is evicted here."""
        return self.n

    def append(self, k: Any, v: Any) -> None:
        """Add tokens: k (g, t, d), v (g, t, dv), or with a leading B; if either is refused, neither is added."""
        keys = self._rows("k", k)
        if tuple(k.shape[:-2]) != self._leading or k.shape[-1] != self._d:
            raise ArgumentError(f"k must be {(*self._leading, 't', self._d)} to match the cache; got {tuple(k.shape)}")
        values = self._values_like("v", v, k)
        self._check_range(keys, values)
        if keys.shape[1]:
            n = self.n
            self._keys.put(n, keys)
            self._values.put(n, values)
            self._steps.append(self._keys.rows, self._values.rows)

    def evict(self, ids: Any) -> None:
        """Refused: selectors name tokens by their places, and what they know of them cannot forget."""
        raise ArgumentError(f"ids must stay: {self._policy!r} cannot evict; got {len(ids)} ids")

    def lists(self, q: Any) -> TokenLists:
        """What the selector lists for q; one that remembers its last step counts this as one."""
        return self._lists(self._row("q", q))

    def attend(self, q: Any) -> Result:
        """Attention of q (h, 1, d) or (B, h, 1, d) over what is listed for it."""
        rows = self._row("q", q)
        lists = self._lists(rows)
        output, lse = self._attend(rows, self._keys.rows, self._values.rows, lists, self._scale)
        if self._device.type == "cpu":
            output, lse = torch.from_numpy(output), torch.from_numpy(lse)
        bounds = self._steps.bounds(Attended(rows, self._keys.rows, self._values.rows, output, lse))
        reported = lists.attended().repeat_interleave(len(rows) // len(lists.tokens))
        work = Counters(*[self._like(x, q) for x in (reported, torch.zeros_like(reported), reported)])
        made = _certificate(output, lse, bounds, self._dtype)
        arrays = {name: self._like(x, q) for name, x in vars(made).items() if isinstance(x, torch.Tensor)}
        made = dataclasses.replace(made, **arrays)
        rows_of, sums, empty = (self._like(x, q) for x in (output, lse, lse.isneginf()))
        result = Result(rows_of, sums, empty, made, work, self.n)
        return result.shaped(q.shape[:-1], q) if self._device.type == "cpu" else result

    def _like(self, x: torch.Tensor, q: Any) -> Any:
        """Of heads (H, ...) -> of the leading shape of q, on a GPU; on a CPU numpy of (H, 1, ...), which is shaped."""
        return x[:, None].numpy() if self._device.type == "cpu" else x.view(*q.shape[:-1], *x.shape[1:])

    def _lists(self, rows: torch.Tensor) -> TokenLists:
        lists: TokenLists = self._steps.choose(rows, self._keys.rows, self._values.rows)
        check_shapes(lists, len(rows), len(self._keys.rows), (self._d, self._dv))
        return lists

    def _row(self, name: str, q: Any) -> torch.Tensor:
        """q as (H, d), if it is one row a head and fits the cache."""
        if len(getattr(q, "shape", ())) < 2 or q.shape[-2] != 1:
            wanted = "(h, 1, d)" if len(self._leading) == 1 else "(B, h, 1, d)"
            found = tuple(getattr(q, "shape", ()))
            raise ArgumentError(f"{name} must be one row a head for {self._policy!r}, {wanted}; got shape {found}")
        rows = self._queries(name, q)[:, 0]
        if self._device.type == "cpu":
            length = self._scale * float(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).max())
            self._within("q and k", "scaled queries and scores", max(length, length * self._longest))
        return rows

    def _queries(self, name: str, q: Any) -> torch.Tensor:
        """q (.., h, m, d) as (H, m, d), if it fits the cache."""
        queries = self._rows(name, q)
        if len(q.shape) != len(self._leading) + 2 or tuple(q.shape[:-3]) != self._leading[:-1]:
            raise ArgumentError(f"{name} must have the cache's batch {self._leading[:-1]}; got shape {tuple(q.shape)}")
        if q.shape[-1] != self._d:
            raise ArgumentError(f"{name} must have width {self._d} to match k; got shape {tuple(q.shape)}")
        checks.grouped(name, q.shape[-3], self._leading[-1])
        return queries

    def _values_like(self, name: str, v: Any, k: Any) -> torch.Tensor:
        values = self._rows(name, v)
        if tuple(v.shape[:-1]) != tuple(k.shape[:-1]) or v.shape[-1] != self._dv:
            wanted = (*k.shape[:-1], self._dv)
            raise ArgumentError(f"{name} must be {wanted} to match k and the cache; got shape {tuple(v.shape)}")
        return values

    def _rows(self, name: str, array: Any) -> torch.Tensor:
        """(.., rows, width) as a tensor (heads, rows, width), if it has the cache's dtype and lies where it does."""
        if checks.dtype_name(name, array) != self._dtype:
            raise ArgumentError(f"{name} must have the cache's dtype {self._dtype}; got {array.dtype}")
        if self._device.type == "cpu":
            plain = checks.floats(name, fold(name, array), (3,))
            return torch.from_numpy(np.require(plain, requirements="W"))  # torch has no tensors that cannot be written
        if not isinstance(array, torch.Tensor) or array.device != self._device:
            found = getattr(array, "device", type(array).__name__)
            raise ArgumentError(f"{name} must be a torch tensor on {self._device}; got one on {found}")
        folded: torch.Tensor = fold(name, array.detach())
        return folded

    def _check_range(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuse what would overflow on the way; on a GPU nothing is looked at."""
        if self._device.type == "cpu" and keys.shape[1]:
            longest = float(torch.linalg.vector_norm(keys, dim=2, dtype=torch.float64).max())
            self._within("k", "keys", longest)
            self._within("v", "entries", float(values.abs().max()) if values.numel() else 0.0)
            self._longest = max(self._longest, longest)

    def _within(self, name: str, kind: str, found: float) -> None:
        dtype = "float64" if self._dtype == "float64" else "float32"
        if not found <= LARGEST[dtype]:
            raise ArgumentError(f"{name} must have {kind} of at most {LARGEST[dtype]:.0e} in {dtype}; got {found:.3g}")


def _certificate(output: torch.Tensor, lse: torch.Tensor, bounds: Bounds | None, dtype: str) -> Any:
    """Of outputs (H, dv), with tensors (H,) where a `Certificate` has arrays; it claims nothing where there is none."""
    if bounds is None:
        unknown: Any = torch.full_like(lse, math.inf)
        return Certificate("none", unknown, unknown, unknown, unknown)
    size = torch.linalg.vector_norm(output, dim=1, dtype=torch.float64)
    error = bounds.output_error + ROUNDING[dtype] * (1 + 1e-6) * size + SMALLEST[dtype] * math.sqrt(output.shape[1])
    relative: Any = torch.where(size > error, error / (size - error), math.inf)
    mass, off, apart = cast(Any, (bounds.dropped_mass, error, bounds.lse_error))
    return Certificate("statistical", mass, off, relative, apart, bounds.confidence)


session = SelectedSession  # the table's entry

"""Sparse attention for any torch module that calls ``torch.nn.functional.scaled_dot_product_attention``.

A `TorchFunctionMode` sees the calls of its own thread wherever they are made, also through names that other modules
imported before; nothing is patched, so that leaving the context, by an exception too, leaves nothing behind.

- ``torch.nn.MultiheadAttention`` and ``TransformerEncoderLayer`` are seen too where they compute no weights to return
  (``need_weights=False``): torch gives up its fused encoder there, which changes rounding.  Attention that is written
  out, scripted modules and ``torch.ops.aten`` are not seen, nor are threads that a module starts, as `DataParallel`.
- A module that was compiled is compiled anew inside, with a graph break at every call, and again as before outside;
  with ``fullgraph=True`` torch raises.  Enter the context outside of what is compiled.
- Inside another such context the inner one alone serves.  What a policy itself computes is never sparse.
- Under autocast the arguments are cast as torch casts them.
- A call that needs gradients is dense.  Under ``no_grad`` nothing tells that a later pass will differentiate, as
  reentrant checkpointing does: such a call is served.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple, Self, TypeGuard

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from attention.engine import Stepwise, is_policy, is_shared, is_stepwise
from attention.policies import Policy
from attention.prefill import prefill as prefilled
from attention.result import Result
from attention.sampled import Sampled
from attention.session import DecodeSession
from attention.shared_prompt import Shared
from hsr import checks
from hsr.errors import ArgumentError, BackendUnavailable

SDPA: Callable[..., torch.Tensor] = torch._C._nn.scaled_dot_product_attention
HEADS = functional.multi_head_attention_forward  # a mode sees it as a whole, and is off inside
FUSED = torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention  # torch takes them when it compiles
Policies = Policy | Sampled | Shared | Stepwise | None


@dataclass(frozen=True)
class Call:
    """One call of scaled_dot_product_attention.

    Attributes:
        number: of the call among the context's, from 0 on.
        query, key: shapes.
        policy: that served it; None of a dense call.
        reason: why it was dense; empty of one that was served.
        reported: (row, key) pairs attended to, over all heads, a number or a tensor on a GPU; None of a dense call.
        visible: pairs that dense attention would have attended to.
    """

    number: int
    query: tuple[int, ...]
    key: tuple[int, ...]
    policy: Policies = None
    reason: str = ""
    reported: Any = None
    visible: int = 0

    @property
    def share(self) -> float:
        """Attended to, of what was visible; waits for the GPU where that has to say."""
        return 1.0 if self.reported is None else float(self.reported) / self.visible


@dataclass
class Calls:
    """What became of every call, in order; each is in one of the two."""

    served: list[Call] = field(default_factory=list)
    dense: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class _Asked:
    """The arguments of a call, as torch names them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = field(default=None, kw_only=True)
    enable_gqa: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, args: tuple[Any, ...], named: dict[str, Any]) -> Self | None:
        """None where torch will refuse them itself."""
        try:
            asked = cls(*args, **named)
        except TypeError:
            return None
        return asked if all(isinstance(x, torch.Tensor) for x in asked.tensors) else None

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of query and key."""
        return self.query.shape[-2], self.key.shape[-2]

    def strange(self) -> str | None:
        """Why nothing can be read off these tensors; None if they are plain."""
        if (
            torch._C._get_tracing_state() is not None
            or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        ):
            return "query, key and value must not be traced, for a trace keeps what these values chose"
        for name, x in zip(("query", "key", "value"), self.tensors, strict=True):
            plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_nested
            if not plain or x.ndim < 2 or torch._C._functorch.is_functorch_wrapped_tensor(x):
                return f"{name} must be a plain tensor of two axes or more; got {type(x).__name__} of {x.layout}"
            if unpack_dual(x).tangent is not None:
                return f"{name} must have no tangent of forward-mode differentiation; got one"
        return None

    def hidden(self) -> str | None:
        """Why the keys that each row sees are not those up to its own; None if they are, the last row seeing all."""
        m, n = self.rows
        mask, causal = self.attn_mask, self.is_causal
        if isinstance(mask, CausalBias) and not causal and (mask.seq_len_q, mask.seq_len_kv) == (m, n):
            if m == n or (m < n and mask.variant is CausalVariant.LOWER_RIGHT):
                return None
            return f"attn_mask must be causal to the lower right, with no more queries than keys; got {m} and {n} rows"
        if mask is not None:
            kind = f"{type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}"
            return f"attn_mask must be None, with is_causal=True, or a fitting torch.nn.attention.bias; got {kind}"
        if causal:
            return None if m == n else f"query must have {n} rows like key when is_causal, aligned top left; got {m}"
        return None if m == 1 else f"is_causal must be True for more than one row of query; got {causal} and {m} rows"

    def unfit(self) -> str | None:
        """Why no policy can serve the call; None if one might."""
        if self.dropout_p != 0:
            return f"dropout_p must be 0; got {self.dropout_p}"
        q, k, v = self.tensors
        if torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors):
            return "query, key and value must need no gradients; got one that does, with gradients enabled"
        if any(x.device.type not in ("cpu", "cuda") or x.device != q.device for x in self.tensors):
            return f"query, key and value must be on the CPU or one CUDA device; got {q.device}, {k.device}, {v.device}"
        shapes = tuple(tuple(x.shape) for x in self.tensors)
        grouped = self.enable_gqa and q.ndim > 2
        alike = q.shape[:-3] == k.shape[:-3] if grouped else q.shape[:-2] == k.shape[:-2]
        if not alike or q.ndim != k.ndim or k.shape[:-1] != v.shape[:-1] or any(0 in shape for shape in shapes):
            return f"query, key and value must fit without broadcasting, and not be empty; got {shapes}"
        return None

    def cast(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as autocast has them, with 3 or 4 axes."""
        q, k, v = self.tensors
        device = q.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in self.tensors)
        return _folded(q), _folded(k), _folded(v)

    def attended(self, policy: Any) -> Result:
        """By a policy; output of 3 or 4 axes."""
        q, k, v = self.cast()
        with torch.autocast(q.device.type, enabled=False):
            if self.rows[0] == 1:
                return DecodeSession(k, v, policy=policy, scale=self.scale).attend(q)
            return prefilled(q, k, v, policy=policy, scale=self.scale)

    def laid(self, output: torch.Tensor) -> torch.Tensor:
        """In the query's shape, and order of axes in memory, as torch's fused kernels do."""
        shaped = output.reshape(*self.query.shape[:-1], output.shape[-1])
        if self.query.ndim != 4 or shaped.shape != self.query.shape:
            return shaped
        like = torch.empty_like(self.query, dtype=shaped.dtype)
        return shaped if like.stride() == shaped.stride() else like.copy_(shaped)

    @property
    def visible(self) -> int:
        """Pairs of rows and keys, over all heads."""
        m, n = self.rows
        return math.prod(self.query.shape[:-2]) * (m * n - m * (m - 1) // 2)


class _Left(NamedTuple):
    """Why a call is left to torch's function."""

    reason: str
    wanted: bool = False  # by the arguments of the context
    fault: Exception | None = None


class _Busy(threading.local):
    """Whether a call is being answered in this thread."""

    now = False


_BUSY = _Busy()


@contextmanager
def _busy() -> Iterator[None]:
    _BUSY.now = True
    try:
        yield
    finally:
        _BUSY.now = False


class sparse_sdpa(TorchFunctionMode):
    """A context in which calls of scaled_dot_product_attention are served by sparse policies.

    >>> from attention import TopR
    >>> q, k, v = torch.randn(3, 2, 8, 128, 16).unbind()
    >>> with sparse_sdpa(prefill=TopR(32), dense_below=64) as calls:
    ...     rows = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    ...     mixed = functional.scaled_dot_product_attention(q, k, v)
    >>> len(calls.served), calls.dense[0].reason
    (1, 'is_causal must be True for more than one row of query; got False and 128 rows')

    Served are causal self-attention, ``is_causal`` with as many queries as keys or a `CausalBias` to the lower right,
    by ``prefill``; and one row a head without a mask, whatever its keys are of, by ``decode``.  Other masks are not
    read, for that costs a pass over them: a causal one in full is dense.  All else goes to torch's function, bit for
    bit: dropout, what needs gradients, arguments that broadcast, and what a policy refuses, as NaN on the CPU.  Every
    call is recorded, a dense one with the reason.

    Nothing is kept between calls: an index or a selector's state is made anew for every one, so that a ``decode``
    policy reads all keys at least once and is no faster than dense attention; it shows what a policy does to a model.
    `attention.DecodeSession` keeps them.  Of three axes the first is taken for heads, of five and more the last three
    for heads, rows and width.

    Args:
        prefill: a policy of `attention.prefill`, None for dense attention, or a function of the call's number, from 0
            on, that returns one of them: layers of their own seed, or dense first ones.
        decode: likewise a policy of `attention.DecodeSession`.
        dense_below: calls with fewer keys are dense.
        strict: raise, instead of turning to torch's function, for a call that no policy can serve.  What is dense
            because ``dense_below``, ``prefill`` or ``decode`` says so stays dense.

    Raises:
        ArgumentError: on construction, a value out of range or no policy; in the calls, with ``strict``, the reason,
            which names the argument.
    """

    def __init__(
        self,
        *,
        prefill: Policies | Callable[[int], Policies] = None,
        decode: Policies | Callable[[int], Policies] = None,
        dense_below: int = 1024,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self._given = {"prefill": prefill, "decode": decode}
        for name, given in self._given.items():
            if not _numbered(given):
                _check(name, given)
        self._dense_below = checks.whole("dense_below", dense_below, 0)
        if not isinstance(strict, bool):
            raise ArgumentError(f"strict must be True or False; got {strict!r}")
        self._strict = strict
        self._calls = Calls()
        names = vars(functional) | {"has_torch_function": lambda _: False, "scaled_dot_product_attention": self._called}
        self._heads = FunctionType(HEADS.__code__, names, HEADS.__name__, HEADS.__defaults__)

    def __enter__(self) -> Calls:
        """What becomes of the calls, of earlier entries too."""
        super().__enter__()
        return self._calls

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Any function of torch that is called inside."""
        named = kwargs or {}
        if func is SDPA:
            return self._called(*args, **named)
        if func is HEADS:
            return self._heads(*args, **named)
        if func is FUSED[0] or func is FUSED[1]:
            return self._fused(func, args, named)
        return func(*args, **named)

    @torch.compiler.disable
    def _called(self, *args: Any, **named: Any) -> torch.Tensor:
        asked = _Asked.of(args, named)
        if asked is None or _BUSY.now:
            return SDPA(*args, **named)
        with _busy():
            return self._answered(asked, lambda: SDPA(*args, **named))

    @torch.compiler.disable
    def _fused(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if _BUSY.now:
            return func(*args, **named)
        with _busy():
            self._leave(_Left(f"query of {func.__name__} cannot be known: the compiled layer keeps its fused form"))
            return func(*args, **named)

    def _answered(self, asked: _Asked, dense: Callable[[], torch.Tensor]) -> torch.Tensor:
        """By a policy or by torch, and recorded."""
        number, shapes = self._number, (_shape(asked.query), _shape(asked.key))
        found = self._decided(asked, number)
        if not isinstance(found, _Left):
            try:
                result = asked.attended(found)
            except (ArgumentError, BackendUnavailable) as refused:
                found = _Left(f"{found!r} refuses: {refused}", fault=refused)
            else:
                reported = result.counters.reported.sum()
                self._calls.served.append(Call(number, *shapes, found, "", reported, asked.visible))
                return asked.laid(result.output)
        self._leave(found, *shapes)
        return dense()

    @property
    def _number(self) -> int:
        """Of the call that comes next."""
        return len(self._calls.served) + len(self._calls.dense)

    def _leave(self, left: _Left, query: tuple[int, ...] = (), key: tuple[int, ...] = ()) -> None:
        """Record a call that torch is to answer, or raise."""
        if self._strict and not left.wanted:
            raise ArgumentError(left.reason) from left.fault
        self._calls.dense.append(Call(self._number, query, key, reason=left.reason))

    def _decided(self, asked: _Asked, number: int) -> Any:
        """The policy that is to serve a call, or why none can."""
        reason = asked.strange()
        if reason is not None:
            return _Left(reason)
        m, n = asked.rows
        if n < self._dense_below:
            return _Left(f"key has {n} rows, fewer than dense_below={self._dense_below}", wanted=True)
        reason = asked.hidden()
        if reason is not None:
            return _Left(reason)
        name = "decode" if m == 1 else "prefill"
        policy = self._given[name]
        if _numbered(policy):
            policy = policy(number)
            _check(name, policy)
        if policy is None:
            return _Left(f"{name} is None", wanted=True)
        reason = asked.unfit()
        return policy if reason is None else _Left(reason)


def _numbered(given: Any) -> TypeGuard[Callable[[int], Any]]:
    """Whether it is a function of a call's number; a class of policies is none."""
    return callable(given) and not isinstance(given, type) and not is_policy(given)


def _check(name: str, policy: Any) -> None:
    other = is_stepwise(policy) if name == "prefill" else is_shared(policy)
    if policy is not None and (other or not is_policy(policy)):
        serves = "prefill" if name == "prefill" else "DecodeSession"
        raise ArgumentError(f"{name} must be a policy of attention.{serves}, None or a function; got {policy!r}")


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    """Of a nested tensor, which has none, and of one that is traced, whose sizes are tensors: ()."""
    return () if x.is_nested or torch._C._get_tracing_state() is not None else tuple(x.shape)


def _folded(x: torch.Tensor) -> torch.Tensor:
    return x[None] if x.ndim == 2 else x.flatten(0, max(0, x.ndim - 4))

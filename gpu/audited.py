"""A prompt on a GPU as `attention.audit` looks at it: exact attention on some rows, and a result's rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attention.result import Result
from attention.weights import ReLUPower, Softmax
from gpu import audit_bounds
from gpu.audit_bounds import Awaited
from gpu.audit_errors import measure
from gpu.exact_rows import parts
from gpu.prompt import batched
from gpu.tensors import sent
from hsr import checks
from hsr.errors import ArgumentError


def refuses(*, causal: bool, weight: Softmax | ReLUPower, **call: object) -> str | None:
    """Why a prompt on a GPU cannot be audited; None if it can."""
    if causal and isinstance(weight, Softmax):
        return None
    return f"serves causal prompts with Softmax() alone; got causal={causal} and {weight!r}"


@dataclass(frozen=True)
class CudaPrompt:
    """See `attention.audit_rows.Prompt`; exact attention multiplies in the tensors' dtype and sums in float32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool
    weight: Softmax
    scale: float

    @property
    def n(self) -> int:
        """Keys."""
        return self.k.shape[-2]

    def estimates(self, selection: Any, rows: np.ndarray, tolerance: float, delta: float) -> Awaited:
        """Rows (H, s), in the order of drawing, of a `Result` whose tensors lie on the GPU; nothing waits for it.

        Raises:
            ArgumentError: anything else, or one of another prompt.
        """
        if not isinstance(selection, Result) or not isinstance(selection.output, torch.Tensor):
            raise ArgumentError(
                f"selection must be a policy, or a Result of {self.q.device}; got {type(selection).__name__}"
            )
        if tuple(selection.output.shape) != tuple(self.q.shape):
            raise ArgumentError(
                f"selection must have output {tuple(self.q.shape)} to match q; got {tuple(selection.output.shape)}"
            )
        lse: Any = selection.lse
        if tuple(lse.shape) != tuple(self.q.shape[:-1]):
            raise ArgumentError(
                f"selection must have lse {tuple(self.q.shape[:-1])} to match q; got {tuple(lse.shape)}"
            )
        for name, part in (("output", selection.output), ("lse", lse)):
            if not isinstance(part, torch.Tensor) or part.device != self.q.device:
                where = part.device if isinstance(part, torch.Tensor) else type(part).__name__
                raise ArgumentError(f"selection must have {name} on {self.q.device}; got {where}")
        output, sums = selection.output.contiguous(), lse.contiguous()
        (heads, drawn), (m, d) = rows.shape, self.q.shape[-2:]
        told = sent(audit_bounds.settings(heads, m, tolerance, delta), self.q.device)
        packed = torch.empty(sum(audit_bounds.sizes(heads, drawn)), dtype=torch.float64, device=self.q.device)
        with torch.cuda.device_of(self.q):
            found = parts(*batched(self.q, self.k, self.v), rows, self.scale)
            measure(found, output.view(heads, m, d), sums.view(heads, m), told[3:], packed)
        leading = tuple(self.q.shape[:-2])
        return audit_bounds.awaited(packed, told, (heads, drawn), m, delta, tolerance, leading)


def audited(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, weight: Softmax, scale: float | None
) -> CudaPrompt:
    """The table's entry; tensors as for `gpu.prompt.prompt`."""
    batched(q, k, v)
    factor = k.shape[-1] ** -0.5 if scale is None else checks.real("scale", scale, np.nextafter(0, 1), math.inf)
    return CudaPrompt(q, k, v, causal, weight, factor)

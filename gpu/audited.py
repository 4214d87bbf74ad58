"""A prompt on a GPU as `attention.audit` looks at it: exact attention on some rows, and a result's rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attention.engine import prompt_limits
from attention.result import Result
from attention.weights import ReLUPower, Softmax
from gpu import listed
from gpu.prompt import batched
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
    limits: np.ndarray  # (H, m); keys each row sees

    @property
    def n(self) -> int:
        """Keys."""
        return self.k.shape[-2]

    def exact(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows (H, s) -> output (H, s, dv), log-sum-exp (H, s)."""
        q, k, v = batched(self.q, self.k, self.v)
        chosen = torch.from_numpy(rows.astype(np.int32)).to(self.q.device)
        output, lse = listed.rows(q, k, v, chosen, self.scale)
        return _host(output.flatten(0, 1)), _host(lse.flatten(0, 1))

    def attended(self, selection: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows (H, s) of a `Result` whose tensors lie on the GPU, likewise.

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
        chosen = torch.from_numpy(rows).to(self.q.device)
        output = selection.output.reshape(*self.limits.shape, -1)
        lse: Any = selection.lse
        picked = output.gather(1, chosen[..., None].expand(-1, -1, output.shape[2]))
        return _host(picked), _host(lse.reshape(self.limits.shape).gather(1, chosen))


def audited(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, weight: Softmax, scale: float | None
) -> CudaPrompt:
    """The table's entry; tensors as for `gpu.prompt.prompt`."""
    batched(q, k, v)
    factor = k.shape[-1] ** -0.5 if scale is None else checks.real("scale", scale, np.nextafter(0, 1), math.inf)
    return CudaPrompt(q, k, v, causal, weight, factor, prompt_limits(q, k, causal))


def _host(part: torch.Tensor) -> np.ndarray:
    found: np.ndarray = part.double().cpu().numpy()
    return found

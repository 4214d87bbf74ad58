"""Other people's causal attention over a whole prompt on the GPU: dense kernels, and FlexAttention over blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attention.key_lists import KEYS, ROWS, bands, budget, edges, row_blocks

Attend = Callable[[], torch.Tensor]  # -> (B, h, n, d)


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attend:
    def attend() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def _flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attend:
    """FlashAttention-3 over copies in its own layout, (B, n, h, d); some versions return a log-sum-exp beside."""
    from flash_attn_interface import flash_attn_func

    parts = [part.transpose(1, 2).contiguous() for part in (q, k, v)]

    def attend() -> torch.Tensor:
        found = flash_attn_func(*parts, causal=True)
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output.transpose(1, 2)

    return attend


KERNELS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Attend]] = {
    # name -> what makes dense causal attention of q (B, h, n, d) to k, v (B, g, n, d); fails where it serves them not
    "sdpa cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "flash-attention 3": _flash3,
}


class Flex:
    """Torch's FlexAttention over 128 x 128 blocks of q (B, h, n, d) and k, v (B, g, n, d), n a multiple of 128.

    Every block of rows attends to its diagonal block and to random earlier ones; each head has its own.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Nothing is compiled yet."""
        self._parts = q, k, v

    @cached_property
    def _attend(self) -> Callable[..., torch.Tensor]:
        """Compiled for these shapes, when first called, whatever was compiled for others."""
        torch.compiler.reset()
        return torch.compile(flex_attention, dynamic=False)

    def over(self, mask: BlockMask) -> torch.Tensor:
        """-> (B, h, n, d)."""
        found: torch.Tensor = self._attend(*self._parts, block_mask=mask, enable_gqa=True)
        return found

    def mask(self, density: float) -> tuple[BlockMask, int]:
        """Blocks of that density in `attention.key_lists`'s sense, and the pairs of rows and keys that they hold."""
        q = self._parts[0]
        h, n = q.shape[1:3]
        T = row_blocks(n)
        eligible = torch.from_numpy(edges(n, n) // KEYS).to(q.device)  # (T,) blocks before the diagonal one
        share = budget(density, n, n) / max(int(edges(n, n).sum()), 1)
        many = (eligible * share).round().long()
        random = torch.Generator(q.device).manual_seed(n)
        order = torch.rand(h, T, T, device=q.device, generator=random)
        order.masked_fill_(torch.arange(T, device=q.device) >= eligible[:, None], 2.0)
        chosen = order.argsort(2).argsort(2) < many[:, None]
        full = (~chosen).byte().argsort(dim=2, stable=True).int()  # the chosen ones first, ascending
        diagonal = torch.zeros_like(full)
        diagonal[:, :, 0] = torch.arange(T, device=q.device)
        counts = torch.ones(1, h, T, dtype=torch.int32, device=q.device), many.int().expand(1, h, T).contiguous()
        mask = BlockMask.from_kv_blocks(
            counts[0], diagonal[None], counts[1], full[None], BLOCK_SIZE=(ROWS, KEYS), mask_mod=_causal
        )
        return mask, h * (int(many.sum()) * ROWS * KEYS + diagonal_pairs(n))


def diagonal_pairs(n: int) -> int:
    """Pairs of rows and keys in the bands of a prompt of n tokens, n a multiple of 128."""
    return int(bands(n, n).sum()) * (ROWS + 1) // 2


def _causal(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return i >= j

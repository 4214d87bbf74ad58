"""The cache of one layer: keys and values in memory that doubles, and what attends to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from attention.held_rows import HeldRows
from attention.integrations import trial
from attention.integrations.dense_rows import dense
from attention.integrations.masks import Seen
from attention.integrations.passes import no_gradient, noted_rows, once
from attention.integrations.steps import Fused, Sessions, Steps, fuses
from attention.prefill import prefill
from hsr.errors import ArgumentError

ROWS = 16  # most rows of a pass over a cache that are decoded one by one; more are a prompt
REBUILD = 1024  # rows of a prompt beyond which sessions are made anew, not told of each
KNOWN = 128  # the prompt's last rows, which codes are fitted to


class HSRLayer(CacheLayerMixin):
    """Keys and values of a layer with full attention, and the policies that serve it.

    Args:
        decode: policy of decode steps, or None for dense attention.
        prompt: policy of prompts, or None for dense attention.
        dense_below: tokens below which attention is dense; None decides by trials.
        trials: of prompts, shared by the layers.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, decode: Any, prompt: Any, dense_below: int | None, trials: trial.PromptTrials) -> None:
        self._policies = decode, prompt, dense_below, trials
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.steps: Steps | None = None  # what serves decode steps; None while they are dense
        self._held: tuple[HeldRows, HeldRows] | None = None  # `Fused` steps hold the rows themselves
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None  # rows that fused steps take in
        self._n = self.batch = self._unattended = 0
        self._retry = 0  # tokens from which steps are tried again
        self._seen = Seen()  # the padding that steps know of
        self._queries: torch.Tensor | None = None
        self._asked: tuple[int, float, Seen] | None = None  # query heads, scale and padding of the last pass

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype, device and batch."""
        self.dtype, self.device, self.batch = key_states.dtype, key_states.device, len(key_states)
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """(B, g, n, d), a view; None where nothing is held."""
        return self._view(0)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """(B, g, n, dv), a view; None where nothing is held."""
        return self._view(1)

    def _view(self, which: int) -> torch.Tensor | None:
        if isinstance(self.steps, Fused):
            return self.steps.rows(which)
        return None if self._held is None else self._held[which].rows.unflatten(0, (self.batch, -1))

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in key_states (B, g, m, d) and value_states (B, g, m, dv); what it returns is for "hsr" attention alone.

        Raises:
            ArgumentError: another batch or dtype than before, gradients; rows before that nobody attended to, where
                steps are one launch each.
        """
        no_gradient(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._pending is not None:
            raise ArgumentError("the last pass was refused or attended elsewhere: reset the cache")
        if any(self._policies[:2]) and not key_states.dtype == value_states.dtype == self.dtype:
            raise ArgumentError(
                f"key_states and value_states must be {self.dtype}, without autocast; got {key_states.dtype} and "
                f"{value_states.dtype}"
            )
        if len(key_states) != self.batch:
            raise ArgumentError(f"key_states must have the cache's batch {self.batch}; got {len(key_states)}")
        if isinstance(self.steps, Fused) and key_states.shape[2] <= ROWS:
            self._pending = key_states, value_states
            self._took(key_states.shape[2])
            return noted_rows(key_states.view_as(key_states), value_states.view_as(value_states), self)
        self._take_back()
        self._put(key_states, value_states)
        self._took(key_states.shape[2])
        k, v = self.keys, self.values
        assert k is not None and v is not None
        return noted_rows(k, v, self)

    def _took(self, rows: int) -> None:
        self._n += rows
        self._unattended = rows

    def _put(self, k: torch.Tensor, v: torch.Tensor) -> None:
        rows = k.flatten(0, 1), v.flatten(0, 1)
        if self._held is None:
            self._held = HeldRows(rows[0]), HeldRows(rows[1])
            return
        for held, new in zip(self._held, rows, strict=True):
            held.put(held.rows.shape[1], new)

    def _take_back(self) -> None:
        """Hold the rows again that fused steps hold, pending ones too; others stay."""
        if isinstance(self.steps, Fused):
            held, pending = (self.steps.rows(0), self.steps.rows(1)), self._pending
            self.steps = self._pending = None
            for part in (held, pending):
                if part is not None:
                    self._put(*part)

    def attend(
        self, module: torch.nn.Module, q: torch.Tensor, mask: torch.Tensor | None, seen: Seen, **options: Any
    ) -> torch.Tensor:
        """q (B, h, m, d), the rows of the last tokens, with the layer's mask and what it says -> (B, m, h, dv).

        Raises:
            ArgumentError: not one row for each token of the last update, or a second call for them.
        """
        once(q, self._unattended)
        self._unattended = 0
        self._asked = q.shape[1], options["scaling"], seen
        step = q.shape[2] <= ROWS and q.shape[2] < self._n
        if self.steps is not None and seen != self._seen:
            self._take_back()
            self.steps = None
        if step and (self.steps is not None or self._begins(q, seen, options["scaling"])):
            return self._stepped(q).transpose(1, 2).contiguous()
        self._take_back()
        k, v = self.keys, self.values
        assert k is not None and v is not None
        if isinstance(self.steps, Sessions) and self._n - self.steps.told > REBUILD:
            self.steps = None
        if not step:
            self._queries = q[:, :, -KNOWN:].clone()
            sparse = [self._prompt_is_sparse(q, k, v, left) for left in seen.lefts or (0,)]
            if any(sparse):
                _check(seen)
                return self._prompted(module, q, k, v, mask, seen, sparse, **options)
        return dense(module, q, k, v, mask, seen, **options)

    def _begins(self, q: torch.Tensor, seen: Seen, scale: float) -> bool:
        """Make what serves steps, if the layer has come to where it is to."""
        policy, dense_below = self._policies[0], self._policies[2]
        first = self._n - q.shape[2]  # tokens that were there before this pass
        least = max(self._least, self._retry)
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()  # a graph keeps what it found
        padded = max(seen.lefts or (0,))
        if policy is None or self._n < least or first <= padded or capturing:
            return False
        _check(seen)
        k, v = self.keys, self.values
        assert k is not None and v is not None
        before = k[:, :, :first], v[:, :, :first]
        steps: Steps
        if fuses(policy, k, seen):
            steps = Fused(policy, *before, q.shape[1], scale, self._queries, dense_below)
        else:
            steps = Sessions(policy, *before, seen, scale, self._queries)
        if dense_below is None and not trial.steps_faster(steps, q, k, v):
            self._retry = 2 * self._n
            return False
        self._seen = seen
        if isinstance(steps, Fused):
            self._pending, self._held = (k[:, :, first:].clone(), v[:, :, first:].clone()), None
        self.steps = steps
        return True

    def fused(self) -> Fused | None:
        """What serves steps by one launch each, made now where they were dense; None where it cannot."""
        k, v = self.keys, self.values
        if self.steps is None and k is not None and v is not None and self._asked and not self._unattended:
            policy, _, dense_below, _ = self._policies
            heads, scale, seen = self._asked
            if seen.plain and fuses(policy, k, seen):
                steps = Fused(policy, k, v, heads, scale, self._queries, dense_below)
                if steps.cache.single or (dense_below is not None and self._n + 1 >= dense_below):
                    self.steps, self._seen, self._held = steps, seen, None
        return self.steps if isinstance(self.steps, Fused) else None

    def _stepped(self, q: torch.Tensor) -> torch.Tensor:
        steps, first = self.steps, self._n - q.shape[2]
        assert steps is not None
        if self._pending is not None:
            k, v = self._pending
            self._pending = None
        else:
            held, told = (self.keys, self.values), steps.told
            assert held[0] is not None and held[1] is not None and isinstance(steps, Sessions)
            if first > told:
                steps.extend(held[0][:, :, told:first], held[1][:, :, told:first])
            k, v = held[0][:, :, first:], held[1][:, :, first:]
        rows = [steps.step(*(part[:, :, t : t + 1] for part in (q, k, v))) for t in range(q.shape[2])]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 2)

    @property
    def _least(self) -> int:
        """Tokens below which steps are dense."""
        return trial.LEAST if self._policies[2] is None else self._policies[2]

    def _prompt_is_sparse(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int) -> bool:
        """Whether a sequence with so much padding is, by its own length."""
        _, policy, dense_below, trials = self._policies
        if policy is None:
            return False
        return trials.faster(policy, q, k, v, left) if dense_below is None else self._n - left >= dense_below

    def _prompted(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        seen: Seen,
        sparse: Sequence[bool],
        **options: Any,
    ) -> torch.Tensor:
        """(B, m, h, dv): some sequences by the policy, whose rows of padding are zero, the others densely."""
        policy, (m, n) = self._policies[1], (q.shape[2], k.shape[2])
        if seen.lefts is None:
            whole: torch.Tensor = prefill(q, k, v, policy=policy, scale=options["scaling"]).output
            return whole.transpose(1, 2).contiguous()
        assert mask is not None
        if sum(sparse) > 1 and trial.crossed(policy):
            raise ArgumentError(f"prefill must share nothing between layers in a batch with padding; got {policy!r}")
        output = q.new_zeros(len(q), m, q.shape[1], v.shape[3])
        for b, left in enumerate(seen.lefts):
            row, one = max(left - (n - m), 0), slice(b, b + 1)
            if not sparse[b]:
                output[one] = dense(module, q[one], k[one], v[one], mask[one], Seen((left,)), **options)
            elif row < m:
                rows = q[b, :, row:], k[b, :, left:], v[b, :, left:]
                output[b, row:] = prefill(*rows, policy=policy, scale=options["scaling"]).output.transpose(0, 1)
        return output

    def advance(self, count: int) -> None:
        """Note tokens that replays of a CUDA graph took in, or, below zero, that a capture did not.

        Raises:
            ArgumentError: the layer's steps are not fused, so that no graph can have taken any.
        """
        if not isinstance(self.steps, Fused):
            raise ArgumentError(f"count must not be asked for where no step is one launch; got {count}")
        self._n += count
        self.steps.advance(count)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass of so many rows sees, and where they begin."""
        return self._n + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens, padding included."""
        return self._n

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, so many below zero.

        Raises:
            ArgumentError: more than zero, or more tokens than there are.
        """
        kept = self._n + tokens_to_remove
        if tokens_to_remove > 0 or kept < 0:
            raise ArgumentError(f"tokens_to_remove must be within {-self._n}..0; got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if isinstance(self.steps, Fused) and self._pending is None and (kept >= self._least or self._n < self._least):
            if self.steps.forget(-tokens_to_remove):
                self._n = kept
                return
        self._take_back()
        for held in self._held or ():
            held.keep(kept)
        if isinstance(self.steps, Sessions) and (
            kept < self._least or (self.steps.told > kept and not self.steps.forget(self.steps.told - kept))
        ):
            self.steps = None
        self._n = kept

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Go on with the sequences beam_idx (B',)."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._select([sequence for sequence in range(self.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with the sequences indices, (B',) int64 or (B,) bool."""
        self._select(indices.nonzero()[:, 0].tolist() if indices.dtype == torch.bool else indices.tolist())

    def _select(self, sequences: Sequence[int]) -> None:
        if self._n == 0 or list(sequences) == list(range(self.batch)):
            return
        self._take_back()
        for held in self._held or ():
            heads = len(held.rows) // self.batch
            which = torch.tensor(sequences, device=held.rows.device)[:, None] * heads
            held.select((which + torch.arange(heads, device=which.device)).flatten())
        if isinstance(self.steps, Sessions) and not self.steps.select(sequences):
            self.steps = None
        if self._seen.lefts is not None:
            lefts = tuple(self._seen.lefts[sequence] for sequence in sequences)
            self._seen = Seen(lefts if any(lefts) else None)
        if self._queries is not None:
            self._queries = self._queries[list(sequences)]
        self.batch = len(sequences)

    def __deepcopy__(self, memo: dict[int, Any]) -> HSRLayer:
        """The rows in other memory; steps are made anew where they are needed.

        Raises:
            ArgumentError: rows that nobody attended to.
        """
        if self._pending is not None:
            raise ArgumentError("the last pass was refused or attended elsewhere: reset the cache")
        layer = HSRLayer(*self._policies)
        vars(layer).update(vars(self) | {"steps": None, "_pending": None})
        k, v = self.keys, self.values
        layer._held = None
        if k is not None and v is not None:
            layer._put(k, v)
        return layer


def _check(seen: Seen) -> None:
    """ArgumentError where a mask says what no policy can be told."""
    if not seen.plain:
        raise ArgumentError(
            "attention_mask must be of left padding, (B, n), where attention is sparse; got one that hides other keys"
        )

"""Keys on a GPU beside an int8 code each, whose scores lie within a proven bound of the exact ones.

A head has a middle and a weight per axis, w > 0; a key k becomes ``x = (k - middle) / w`` and is rounded with a step of
its own, ``x = step * code + r``.  A query q becomes ``z = w q`` and is rounded to 16 bits, which two int8 planes hold,
``z = unit * a + t`` with ``a = 254 high + low``.  Then

    <q, k> = <q, middle> + <z, x>
    <z, x> = unit step <a, code> + <t, step code> + <z, r>
          <= unit (step (<a, code> + reach) + slack width),                               (Cauchy-Schwarz)

    reach = ||t|| / unit * 127 sqrt(d) >= ||t|| / unit * ||code||,      width = ||z|| / unit,      slack >= ||r||,

so a key can reach the threshold b only if ``step (<a, code> + reach) + slack width >= level``, with
``level = (b - <q, middle>) / unit``.  Nothing rests on the middle, the weights or the steps being good: they decide how
many keys pass, and ||r|| is measured.

Rounding.  ``<a, code>`` is exact: at most 127 (254 + 1) 127 d < 2**31 for d <= 512.  The epilogue is float32 with
u = 2**-24 and at most 2**-126 lost to underflow: one conversion, two sums and two products err by at most
``5 u step (|<a, code>| + reach) + 3 u slack width + 2**-125``, and ``|<a, code>| + reach`` is at most ``127 sqrt(d)``
times ``width + 3 reach``, in which reach is a fraction of a hundredth.  ``slack`` therefore holds ``||r||``, then
``8 u * 127 sqrt(d) step``, then a factor of 1 + 16 u, and then 2**-100, width being at least 32258 (zero queries
included).  The float64 roundings of x, z, r and t are some 2**-50 ||z|| ||x|| and drown in the 3 u that are left; so
does the rounding band of the float64 scores (`hsr.exact`), but for its share in ``sum |q_i middle_i|``, by which
`gpu.half_space.prepare` lowers the level.  So a key also passes where any order of float64 summation reaches b.

Range.  A key whose x exceeds 2**60 gets slack = inf and always passes; steps are at least 2**-100, so that tiny keys
beside large ones get zero codes and an honest residual; level is clamped to +-2**120, which no sum of a coded key
reaches.  A dead key has slack = -inf and never passes.
"""

from __future__ import annotations

import copy
import math

import torch

SAMPLE = 1 << 14  # keys that set a head's middle and weights
CHUNK = 1 << 23  # entries that are coded at once, in float64
ROOM = 128  # keys by which room grows, at least
LARGEST, SMALLEST = 2.0**60, 2.0**-100  # of what is coded, in units of the weights
EPSILON = 2.0**-24  # of float32


class Int8Codes:
    """Keys of g heads, copied, with room to grow; keys (g, n, d) float16, bfloat16 or float32, d in 1..512.

    Attributes:
        keys: (g, room, d) in the caller's dtype, n of them in use.
        codes: (g, room, row) int8, row being d rounded up to 16, zeros beyond d.
        steps, slack: (g, room) float32.
        middle, weights: (g, d) float64.
        largest: () float64, largest magnitude of any entry ever held.
        n: keys held, dead ones among them.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        heads, self.n, self.d = keys.shape
        self.largest = torch.zeros((), dtype=torch.float64, device=keys.device)
        self._dead = torch.zeros(0, dtype=torch.bool, device=keys.device)
        self.keys = keys.new_zeros(heads, 0, self.d)
        self._move(keys, self.n)

    @property
    def room(self) -> int:
        """Keys that fit without moving."""
        return self.keys.shape[1]

    @property
    def dead(self) -> torch.Tensor:
        """(n,) bool: which keys were deleted.  A view."""
        return self._dead[: self.n]

    def of_head(self, head: int) -> Int8Codes:
        """One head's codes, as views; for reading."""
        view = copy.copy(self)
        for name in ("keys", "codes", "steps", "slack", "middle", "weights"):
            setattr(view, name, getattr(self, name)[head : head + 1])
        return view

    def append(self, keys: torch.Tensor) -> None:
        """Code keys (g, t, d) in place; where there is no room, twice as much is taken and all are coded anew."""
        first, self.n = self.n, self.n + keys.shape[1]
        if self.n > self.room:
            self._move(torch.cat([self.keys[:, :first], keys], 1), 2 * self.n)
        elif keys.shape[1]:
            self.keys[:, first : self.n] = keys
            self._code(first)

    def bury(self, ids: torch.Tensor) -> None:
        """Let keys (t,) int64 never pass again, in any head; their memory is not given back."""
        self._dead[ids] = True
        self.slack[:, ids] = -math.inf

    def _move(self, keys: torch.Tensor, room: int) -> None:
        """Hold keys (g, n, d) with so much room, under a middle and weights that suit them."""
        heads, n, d = keys.shape
        room = -(-max(room, 1) // ROOM) * ROOM
        dead = self._dead
        self._dead = dead.new_zeros(room)
        self._dead[: len(dead)] = dead
        self.keys = keys.new_zeros(heads, room, d)
        self.keys[:, :n] = keys
        self.codes = torch.zeros(heads, room, -(-d // 16) * 16, dtype=torch.int8, device=keys.device)
        self.steps, self.slack = torch.zeros(2, heads, room, dtype=torch.float32, device=keys.device)
        self.middle, self.weights = fitted(keys)
        self._code(0)

    def _code(self, first: int) -> None:
        """Codes of the keys from the first on, a chunk at a time."""
        per = max(1, CHUNK // (len(self.keys) * self.d))
        for start in range(first, self.n, per):
            stop = min(start + per, self.n)
            part = self.keys[:, start:stop].double()
            self.largest = torch.maximum(self.largest, part.abs().amax())
            codes, steps, slack = coded((part - self.middle[:, None]) / self.weights[:, None])
            self.codes[:, start:stop, : self.d] = codes
            self.steps[:, start:stop] = steps
            self.slack[:, start:stop] = slack.masked_fill(self._dead[start:stop], -math.inf)


def fitted(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """keys (g, n, d) -> middle and weights (g, d) float64: the mean, and powers of two near the deviations."""
    heads, n, d = keys.shape
    if n == 0:
        return keys.new_zeros(heads, d, dtype=torch.float64), keys.new_ones(heads, d, dtype=torch.float64)
    sample = keys[:, :: -(-n // SAMPLE)].double()
    size = sample.square().mean((1, 2)).sqrt()[:, None]  # an axis that is constant so far may vary in later keys
    deviation = torch.maximum(sample.std(1, correction=0), size / 1024)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return sample.mean(1), deviation / deviation.frexp().mantissa


def coded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (..., d) float64 -> codes (..., d) int8, steps (...) and slack (...) float32, as the module's text says."""
    longest = x.abs().amax(-1)
    far = longest > LARGEST
    steps = torch.where(far, 1.0, (longest / 127).clamp(min=SMALLEST)).float()
    exact = steps.double()
    codes = (torch.where(far[..., None], 0.0, x) / exact[..., None]).round().clamp(-127, 127)
    residual = (x - codes * exact[..., None]).norm(dim=-1)
    rounding = 8 * EPSILON * 127 * math.sqrt(x.shape[-1]) * exact
    slack = (residual + rounding) * (1 + 16 * EPSILON) + SMALLEST
    return codes.to(torch.int8), torch.where(far, 0.0, steps), torch.where(far, math.inf, slack).float()

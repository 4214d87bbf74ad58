"""Crops of a layer whose steps are one cache's, on the GPU or interpreted: its codes stay, and are of what is held."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("transformers", reason="layers are transformers'")

from attention import Sampled  # noqa: E402
from attention.integrations import layer  # noqa: E402
from attention.integrations.masks import Seen  # noqa: E402
from attention.integrations.steps import Fused  # noqa: E402
from attention.integrations.trial import PromptTrials  # noqa: E402
from gpu import encode  # noqa: E402
from gpu.sampled import SampledCache  # noqa: E402
from tests.gpu.interpreted import HERE, normal, pytestmark  # noqa: E402, F401

G, H, D = 2, 4, 64


class Rows:
    """A layer, the rows that it is to hold, and passes over both."""

    def __init__(self, least: int = 0, budget: float = 1e6) -> None:
        self.layer = layer.HSRLayer(Sampled(budget=budget), None, least, PromptTrials())
        self.held = tuple(normal(1, G, 0, D, dtype=torch.float16) for _ in range(2))
        self.passes = 0

    @torch.no_grad()
    def take(self, count: int) -> None:
        """So many rows at once; outputs are those of exact attention."""
        self.passes += 1
        q, *new = (normal(1, h, count, D, seed=7 * self.passes + h, dtype=torch.float16) for h in (H, G, G + 1))
        new[1] = new[1][:, :G].contiguous()
        self.layer.update(*new)
        self.held = tuple(torch.cat(pair, 2) for pair in zip(self.held, new, strict=True))
        module = torch.nn.Module()
        module.num_key_value_groups = H // G
        found = self.layer.attend(module, q, None, Seen(), scaling=0.125)
        k, v = (part.double().repeat_interleave(H // G, 1) for part in self.held)
        n = k.shape[2]
        seen = torch.arange(n, device=HERE) <= torch.arange(n - count, n, device=HERE)[:, None]
        wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, seen, scale=0.125)
        assert (found.double() - wanted.transpose(1, 2)).norm() < 5e-3 * wanted.norm()

    def crop(self, count: int) -> None:
        self.layer.crop(-count)
        self.held = tuple(part[:, :, : part.shape[2] - count] for part in self.held)
        for found, wanted in zip((self.layer.keys, self.layer.values), self.held, strict=True):
            assert torch.equal(found, wanted)
        assert self.layer.get_seq_length() == self.held[0].shape[2]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one cache on the CPU, too."""
    if HERE == "cpu":
        monkeypatch.setattr(layer, "fuses", lambda *call: True)


def begun(prompt: int) -> tuple[Rows, Fused]:
    """A prompt of so many rows and a step, and what served it."""
    rows = Rows()
    rows.take(prompt)
    rows.take(1)
    assert isinstance(rows.layer.steps, Fused)
    return rows, rows.layer.steps


@pytest.mark.usefixtures("fused")
def test_a_crop_keeps_the_codes() -> None:
    rows, steps = begun(130)
    for _ in range(2):
        rows.take(1)
    codes, lengths = steps.cache.codes, steps.cache.lengths
    for count, more in ((2, 5), (7, 1), (0, 1), (64, 3)):
        rows.crop(count)
        if count:
            assert steps.steps == steps.keys == steps.reported() == 0, "what was counted is gone"
        rows.take(more)
        n = rows.layer.get_seq_length()
        assert rows.layer.steps is steps and steps.told == n
        assert steps.cache.codes is codes and steps.cache.lengths is lengths and lengths.tolist() == [n] * G


@pytest.mark.usefixtures("fused")
def test_a_crop_of_most_tokens_or_below_the_bound_makes_steps_anew() -> None:
    for least, count in ((0, 71), (100, 40)):
        rows = Rows(least)
        rows.take(130)
        rows.take(1)
        assert isinstance(rows.layer.steps, Fused)
        rows.crop(count)
        assert rows.layer.steps is None
        rows.take(1)
        assert isinstance(rows.layer.steps, Fused) == (least == 0)


@pytest.mark.usefixtures("fused")
def test_a_cache_made_in_inference_mode_may_be_cropped_outside_of_it() -> None:
    rows = Rows()
    with torch.inference_mode():
        rows.take(130)
        rows.take(1)
    rows.crop(1)
    rows.take(1)
    with torch.inference_mode():
        rows.crop(1)
        rows.take(1)


@pytest.mark.usefixtures("fused")
def test_a_crop_of_tokens_that_nobody_attended_to_is_served() -> None:
    rows, _ = begun(130)
    one = normal(1, G, 1, D, seed=99, dtype=torch.float16)
    rows.layer.update(one, one)
    rows.held = tuple(torch.cat([part, one], 2) for part in rows.held)
    rows.crop(2)
    rows.take(1)


@pytest.mark.usefixtures("fused")
def test_blocks_that_fill_again_are_coded_again() -> None:
    rows, steps = begun(132)
    rows.crop(13)
    rows.take(9)
    cache = steps.cache
    again = SampledCache(*rows.held, H, cache.draws, 0.125, coded=cache.planes)
    again._maps = cache._maps
    again.codes.zero_()
    encode.encode[(2, G)](
        *again._cache, *cache._maps, again.codes, *again.tokens.strides, again.tokens.most, again.tokens.room, G, 0.125,
        D, cache.planes.columns, cache.planes.row, cache.planes.count, again.tokens.page, num_warps=4,
    )  # fmt: skip
    alike = (cache.codes[:, :128] == again.codes[:, :128]).double().mean()
    assert alike > (0.999 if HERE == "cpu" else 0.98)  # on a GPU TF32 there, float32 here


@pytest.mark.usefixtures("fused")
def test_codes_of_few_tokens_are_made_anew_as_tokens_come() -> None:
    rows, steps = begun(20)
    assert steps.fitted == 20
    rows.take(16)
    assert steps.fitted == 20
    rows.take(10)
    assert steps.fitted == 40 and rows.layer.steps is steps
    assert steps.cache.lengths.tolist() == [47] * G


@pytest.mark.usefixtures("fused")
def test_replays_count_and_captures_do_not() -> None:
    rows = Rows()
    rows.take(30)
    rows.take(2)
    steps = rows.layer.steps
    assert isinstance(steps, Fused)
    rows.crop(1)
    assert steps.reported() == 0
    steps.cache.lengths += 1  # as a replay does
    rows.layer.advance(1)
    assert steps.keys == 32 * H and steps.reported() == 32 * H


@pytest.mark.usefixtures("fused")
def test_only_a_step_of_one_launch_can_be_dense() -> None:
    """Elsewhere a layer below the bound has no fused steps, and a pass across it is served."""
    for least, seen in ((1000, Seen()), (0, Seen(None, plain=False))):
        rows = Rows(least)
        rows.take(40)
        rows.layer._asked = H, 0.125, seen
        found = rows.layer.fused()
        assert found is None or (found.cache.single and seen.plain)
    rows = Rows(50)
    rows.take(45)
    rows.take(8)
    assert isinstance(rows.layer.steps, Fused) and rows.layer.steps.told == 53

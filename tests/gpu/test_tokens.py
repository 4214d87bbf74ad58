"""Caches over buffers and pages that lie elsewhere, and what is refused there."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpu.launches import Tuning  # noqa: E402
from gpu.sampled import Draws, SampledCache  # noqa: E402
from gpu.tokens import Tokens  # noqa: E402
from hsr.errors import ArgumentError  # noqa: E402
from tests.gpu.interpreted import HERE, pytestmark  # noqa: E402, F401
from tests.gpu.test_sampled import ALL, assert_exact, exact, inputs  # noqa: E402

FOUR = Tuning(single=False)


def paged(part, page, table, sizes):
    """part (B, g, n, d) -> a pool (pages, page, g, d), NaN where no token lies."""
    B, g, _, d = part.shape
    pool = torch.full((table.numel(), page, g, d), torch.nan, dtype=part.dtype, device=part.device)
    for b in range(B):
        for t in range(sizes[b]):
            pool[table[b, t // page].long(), t % page] = part[b, :, t]
    return pool


@pytest.mark.parametrize("page", [1, 16, 64])
def test_pages_are_read_and_written_in_place(page):
    k, v, q = inputs(2, 2, 2, 256, 64, seed=page)
    order = torch.randperm(512 // page, generator=torch.Generator().manual_seed(0)).to(torch.int32).to(HERE)
    table = order.view(2, -1).contiguous()
    pools = [paged(part, page, table, (200, 127)) for part in (k, v)]
    cache = SampledCache.adopted(
        *pools, 4, Draws(ALL), 0.125, lengths=[200, 127], pages=table, queries=q[:, :, None], tuning=FOUR
    )
    copied = SampledCache(
        k, v, 4, Draws(ALL), 0.125, lengths=[200, 127], queries=q[:, :, None], coded=cache.planes, tuning=FOUR
    )
    assert (cache.codes[:2, :192] == copied.codes[:2, :192]).all()
    output = torch.empty_like(q)
    cache.step(q, k[:, :, 255].contiguous(), v[:, :, 255].contiguous(), output)
    cache.append(k[:, :, 254].contiguous(), v[:, :, 254].contiguous())
    for b, size in enumerate((200, 127)):
        keys, values = (torch.cat([part[b : b + 1, :, :size], part[b : b + 1, :, 255:]], 2) for part in (k, v))
        assert_exact(output[b : b + 1], cache.lse[b : b + 1], exact(q[b : b + 1], keys, values), torch.float16)
        for t, source in ((size, 255), (size + 1, 254)):
            assert (pools[0][table[b, t // page].long(), t % page] == k[b, :, source]).all()
            assert (pools[1][table[b, t // page].long(), t % page] == v[b, :, source]).all()


def test_buffers_of_any_strides_are_used_in_place():
    k, v, q = inputs(1, 2, 2, 128, 64, seed=1)
    held = torch.zeros(1, 192, 3, 2, 64, dtype=k.dtype, device=HERE)  # tokens before heads, another part between
    keys, values = held[:, :, 0].transpose(1, 2), held[:, :, 2].transpose(1, 2)
    keys[:, :, :128], values[:, :, :128] = k, v
    cache = SampledCache.adopted(keys, values, 4, Draws(ALL), 0.125, lengths=[100], tuning=FOUR)
    output = torch.empty_like(q)
    cache.step(q, k[:, :, 120].contiguous(), v[:, :, 120].contiguous(), output)
    assert (held[:, 100, 0] == k[:, :, 120]).all()
    assert (held[:, :, 1] == 0).all()
    picked = [*range(100), 120]
    assert_exact(output, cache.lse, exact(q, k[:, :, picked], v[:, :, picked]), torch.float16)
    with pytest.raises(ArgumentError, match="in place cannot grow"):
        cache.reserve(1000)


def test_rows_are_those_of_the_tokens():
    k, _, _ = inputs(2, 3, 1, 64, 64, seed=2)
    table = torch.randperm(32).to(torch.int32).view(2, 16).to(HERE)
    pool = paged(k, 4, table, (64, 64))
    ids = torch.randint(64, (2, 3, 9), generator=torch.Generator().manual_seed(3)).to(HERE)
    held = Tokens.adopted(pool, pool, table)
    assert (held.room, held.page, held.most) == (64, 4, 16)
    assert (held.rows(pool, ids) == k.gather(2, ids[..., None].expand(2, 3, 9, 64))).all()


def test_a_drifted_cache_is_coded_anew():
    k, v, q = inputs(1, 1, 2, 2304, 64, seed=4)
    cache = SampledCache(k[:, :, :1024], v[:, :, :1024], 2, Draws(ALL), 0.125, room=2400, tuning=FOUR)
    assert (cache.drift() < 0.1).all()
    far = (k + 4).to(k.dtype)
    for t in range(64):  # the codes of a block are made when it is full
        cache.append(far[:, :, t].contiguous(), v[:, :, t].contiguous())
    assert cache.drift()[0] > 0.001
    cache.keys[:, :, 64:1088] = far[:, :, :1024]
    cache.recode(q[:, :, None])
    assert cache.lengths.tolist() == [1088]
    assert (cache.drift() < 0.5).all()
    output = torch.empty_like(q)
    cache.attend(q, output)
    wanted = exact(q, cache.keys[:, :, :1088], cache.values[:, :, :1088])
    assert_exact(output, cache.lse, wanted, torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": torch.zeros(2, 16, dtype=torch.int64)}, "int32"),
        ({"pages": torch.zeros(32, dtype=torch.int32)}, "B, most"),
        ({"page": 3}, "pages of 1, 2, 4"),
        ({"few": True}, "room for 64"),
        ({"gap": True}, "16 bytes aligned"),
        ({"lengths": None}, "lengths must be given"),
        ({"lengths": [65, 3]}, "lengths must lie in 1..64"),
    ],
)
def test_layouts_that_cannot_be_read_are_refused(change, message):
    page = change.get("page", 4)
    pool = torch.zeros(32, page, 2, 72 if change.get("gap") else 64, dtype=torch.float16, device=HERE)[..., -64:]
    if change.get("gap"):
        pool = torch.zeros(32, page, 2, 68, dtype=torch.float16, device=HERE)[..., :64]
    pages = change.get("pages", torch.arange(32, dtype=torch.int32).view(2, 16)[:, : 8 if change.get("few") else 16])
    with pytest.raises(ArgumentError, match=message):
        SampledCache.adopted(
            pool, pool, 4, Draws(8.0), 0.125, lengths=change.get("lengths", [3, 5]), pages=pages.contiguous().to(HERE)
        )


def test_a_cache_of_its_own_grows():
    k, v, q = inputs(1, 1, 2, 130, 64, seed=5)
    cache = SampledCache(k, v, 2, Draws(ALL), 0.125, room=130, tuning=FOUR)
    before = cache.codes.clone()
    cache.reserve(1000)
    assert cache.room == 1024
    assert (cache.codes[:, :128] == before[:, :128]).all()
    output = torch.empty_like(q)
    cache.attend(q, output)
    assert_exact(output, cache.lse, exact(q, k, v), torch.float16)
    assert np.prod(cache.keys.shape) == 1024 * 64

"""Both forms of the sketch's inner loop compute the stated sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsr.int8_scan import HAS_VNNI, plain_block, vnni_block

FORMS = [plain_block, pytest.param(vnni_block, marks=pytest.mark.skipif(not HAS_VNNI, reason="no AVX512-VNNI here"))]


@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 33), extreme=st.booleans())
def test_masks_are_those_of_the_integer_sums(form, seed: int, groups: int, extreme: bool) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (3, groups, 64, 4)).astype(np.uint8)
    queries = rng.integers(-127, 128, (2, 4, groups, 4)).astype(np.int8)
    if extreme:
        codes[:] = 255
        queries[:] = rng.choice([-127, 127], (2, 4, 1, 1))
    block, tile = rng.integers(3), rng.integers(2)
    sums = np.einsum("gja,iga->ij", codes[block].astype(np.int64), queries[tile].astype(np.int64))
    least = sums[np.arange(4), rng.integers(0, 64, 4)] + rng.integers(0, 2, 4)
    masks = np.zeros(4, np.uint64)
    form(codes, block, queries, tile, least.astype(np.int32), masks)
    bits = (masks[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.array_equal(bits.astype(bool), sums >= least[:, None])

"""Both forms of the sketch's inner loop compute the stated sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsr.int8_scan import HAS_VNNI, plain_block, plain_mask, vnni_block, vnni_mask

NEEDS_VNNI = pytest.mark.skipif(not HAS_VNNI, reason="no AVX512-VNNI here")
FORMS = [(plain_block, plain_mask), pytest.param((vnni_block, vnni_mask), marks=NEEDS_VNNI)]


@pytest.mark.parametrize("forms", FORMS)
@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 33), extreme=st.booleans())
def test_masks_are_those_of_the_integer_sums(forms, seed: int, groups: int, extreme: bool) -> None:
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
    of_tile, of_one = forms
    of_tile(codes, block, queries, tile, least.astype(np.int32), masks)
    bits = (masks[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.array_equal(bits.astype(bool), sums >= least[:, None])
    assert all(of_one(codes, block, queries[tile, i], np.int32(least[i])) == masks[i] for i in range(4))

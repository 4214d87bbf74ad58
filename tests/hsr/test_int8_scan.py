"""Both forms of the sketch's inner loop compute the stated sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsr.int8_scan import HAS_VNNI, plain_mask, plain_run, vnni_mask, vnni_run

NEEDS_VNNI = pytest.mark.skipif(not HAS_VNNI, reason="no AVX512-VNNI here")
FORMS = [(plain_run, plain_mask), pytest.param((vnni_run, vnni_mask), marks=NEEDS_VNNI)]


@pytest.mark.parametrize("forms", FORMS)
@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 33), extreme=st.booleans(), width=st.sampled_from([1, 4]))
def test_masks_are_those_of_the_integer_sums(forms, seed: int, groups: int, extreme: bool, width: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (5, groups, 64, 4)).astype(np.uint8)
    queries = rng.integers(-127, 128, (2, width, groups, 4)).astype(np.int8)
    if extreme:
        codes[:] = 255
        queries[:] = rng.choice([-127, 127], (2, width, 1, 1))
    first, tile = rng.integers(3), rng.integers(2)
    run = rng.integers(1, 6 - first)
    sums = np.einsum("bgja,iga->ibj", codes[first : first + run].astype(np.int64), queries[tile].astype(np.int64))
    least = np.take_along_axis(sums, rng.integers(0, 64, (width, run, 1)), axis=2)[:, :, 0]
    least = (least + rng.integers(0, 2, least.shape)).astype(np.int32)
    masks = np.zeros((width, run), np.uint64)
    of_run, of_one = forms
    of_run(codes, first, queries, tile, least, masks)
    bits = (masks[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.array_equal(bits.astype(bool), sums >= least[:, :, None])
    assert of_one(codes, first, queries[tile, width - 1], least[width - 1, 0]) == masks[width - 1, 0]

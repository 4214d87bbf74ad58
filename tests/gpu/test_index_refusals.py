"""What the index over keys on a GPU refuses, and in which words."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpu.index import CudaIndex  # noqa: E402
from hsr import ArgumentError, BackendUnavailable, HSRIndex  # noqa: E402
from hsr.backend import preferred  # noqa: E402
from tests.gpu.test_index import HERE, normal  # noqa: E402


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (np.ones((3, 2)), "keys must be a torch tensor; got ndarray"),
        (torch.ones(3), r"keys must have 2 axes or 3 axes; got shape \(3,\)"),
        (torch.ones(3, 2).double(), "keys must have dtype float32, float16, bfloat16 on .*; got float64"),
        (torch.ones(3, 2).int(), "got int32"),
        (torch.ones(3, 513), r"width 1..512 on .*; got shape \(3, 513\)"),
        (torch.ones(3, 0), "width 1..512"),
        (torch.ones(0, 3, 2), "at least one head"),
        (torch.tensor([[np.nan]]), "keys must be finite"),
        (torch.tensor([[np.inf]]), "keys must be finite"),
    ],
)
def test_bad_keys_are_refused(keys, message):
    with pytest.raises(ArgumentError, match=message):
        CudaIndex(keys.to(HERE) if isinstance(keys, torch.Tensor) else keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": normal(2, 5)}, r"queries must have width 4 to match keys; got shape \(2, 5\)"),
        ({"queries": normal(4)}, "queries must have 2 axes"),
        ({"queries": normal(2, 4).half()}, "queries must have the index's dtype float32; got float16"),
        ({"queries": np.ones((2, 4), "f4")}, "queries must be a torch tensor on .*; got ndarray"),
        ({"queries": torch.empty(2, 4, device="meta")}, "queries must be a torch tensor on .*; got one on meta"),
        ({"queries": torch.full((2, 4), np.nan, device=HERE)}, "queries must be finite"),
        ({"threshold": np.nan}, "threshold must not be NaN"),
        ({"threshold": torch.tensor([0.0, np.nan], device=HERE)}, "threshold must not be NaN"),
        ({"threshold": "high"}, "threshold must be a number"),
        ({"threshold": 1j}, "threshold must be a real number"),
        ({"threshold": np.zeros(2)}, r"threshold must be a number or a tensor on .*; got ndarray of shape \(2,\)"),
        ({"threshold": torch.zeros(3, device=HERE)}, r"threshold must be a scalar or have shape \(2,\)"),
        ({"threshold": torch.zeros(2, device="meta")}, "got one on meta"),
        ({"prefix": 11}, r"prefix must lie in 0..10; got 11..11"),
        ({"prefix": 1.5}, "prefix must be whole numbers"),
        ({"prefix": torch.tensor([0, -1], device=HERE)}, r"prefix must lie in 0..10; got -1..0"),
        ({"prefix": torch.zeros(2, device=HERE)}, "prefix must be whole numbers"),
    ],
)
def test_bad_queries_are_refused(change, message):
    found = CudaIndex(normal(10, 4))
    arguments = {"queries": normal(2, 4), "threshold": 0.0, "prefix": None} | change
    for call in (found.query, found.count):
        with pytest.raises(ArgumentError, match=message):
            call(arguments["queries"], arguments["threshold"], prefix=arguments["prefix"])


def test_other_bad_arguments_are_refused_and_change_nothing():
    found = CudaIndex(normal(2, 10, 4))
    for heads in (1, 3, 0):
        with pytest.raises(ArgumentError, match=f"queries must have a positive multiple of 2 heads.*got {heads}"):
            found.query(normal(heads, 1, 4), 0.0)
    for r in (0, 11, 1.5, True):
        with pytest.raises(ArgumentError, match="r must"):
            found.topk(normal(2, 1, 4), r)
    bad = [normal(2, 3, 5), normal(3, 3, 4), normal(3, 4), normal(2, 1, 4).half(), normal(2, 1, 4) / 0]
    for keys in bad:
        with pytest.raises(ArgumentError, match="keys must"):
            found.append(keys)
    found.delete(torch.tensor([2], device=HERE))
    for ids in ([2], [3, 3], [10], [-1], [0.5], "a"):
        with pytest.raises(ArgumentError, match="ids must"):
            found.delete(ids)
    assert (found.n, found.alive) == (10, 9)
    with pytest.raises(ArgumentError, match="method must be auto or int8 for keys on a GPU; got 'tree'"):
        CudaIndex(normal(10, 4), "tree")
    with pytest.raises(BackendUnavailable, match="cannot be saved"):
        found.save("index")
    with pytest.raises(BackendUnavailable, match="lends no keys"):
        found.held(np.zeros(1, np.int64))


def test_the_table_names_the_class_and_gives_every_reason():
    assert preferred("index", device="cuda") is CudaIndex
    with pytest.raises(
        BackendUnavailable, match="no index serves this call: 'int8' runs on cuda, the arrays are on cpu"
    ):
        preferred("index", device="cpu")
    assert type(HSRIndex(np.ones((3, 2)))) is HSRIndex

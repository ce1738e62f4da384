"""Dataset and Split: what they accept, subsets, conversion."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import catapult_ext as cx
from catapult_ext.data import Dataset, Split


def make(n: int = 5) -> Dataset:
    x = torch.arange(3.0 * n).reshape(n, 3)
    return Dataset(x, x[:, :1] * 10, "toy", {"origin": "test"})


def test_length_and_indexing():
    data = make()
    assert len(data) == 5
    x, y = data[2]
    assert x.tolist() == [6, 7, 8]
    assert y.tolist() == [60]
    x, y = data[1:3]
    assert x.shape == (2, 3)
    assert y.flatten().tolist() == [30, 60]
    x, y = data[torch.tensor([4, 0])]
    assert y.flatten().tolist() == [120, 0]


def test_serves_a_data_loader():
    batches = list(torch.utils.data.DataLoader(make(), batch_size=2))
    assert [len(x) for x, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([y for _, y in batches]), make().y)


@given(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 8), max_size=4))
def test_subset_of_a_subset_keeps_the_source_rows(first, second):
    data = make()
    part = data.subset(first)
    assert torch.equal(part.x, data.x[first]) if first else len(part) == 0
    assert part.info == {"origin": "test", "indices": first}
    second = [row for row in second if row < len(first)]
    again = part.subset(torch.tensor(second, dtype=torch.long))
    assert again.info["indices"] == [first[row] for row in second]
    assert torch.equal(again.y.flatten(), torch.tensor([30.0 * first[row] for row in second]))
    assert data.info == {"origin": "test"}


def test_subset_by_slice():
    part = make().subset(slice(1, None, 2))
    assert part.info["indices"] == [1, 3]
    assert part.y.flatten().tolist() == [30, 90]
    assert part.name == "toy"


@pytest.mark.parametrize(
    ("indices", "named"), [([0, 5], "5"), ([-1], "-1"), ([0.5], r"0\.5"), ([True], "True")]
)
def test_wrong_subset_rows_are_named(indices, named):
    with pytest.raises(IndexError, match=f"indices must be integers from 0 to 4, got {named}"):
        make().subset(indices)


def test_conversion():
    data = make().to(dtype=torch.float64)
    assert data.x.dtype == data.y.dtype == torch.float64
    assert data.info == make().info
    split = Split(make(), None, make(3)).to("cpu", torch.float64)
    assert split.train.x.dtype == split.test.y.dtype == torch.float64
    assert split.validation is None


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (
            torch.zeros(3, 2),
            torch.zeros(3),
            ValueError,
            r"y must have shape .*\(3, c\), got \(3,\); y\[:, None\]",
        ),
        (torch.zeros(3, 2), torch.zeros(2, 1), ValueError, r"y must have shape .*\(3, c\), got \(2, 1\)"),
        (torch.zeros(3), torch.zeros(3, 1), ValueError, r"x must have shape \(n, \.\.\.\).* got \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), TypeError, "x must be a floating-point"),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.bool), TypeError, "y must be .* got torch.bool"),
        (torch.zeros(3, 2), [[0.0]] * 3, TypeError, "y must be a floating-point tensor, got list"),
        (torch.zeros(3, 2), torch.zeros(3, 1).double(), ValueError, "y must have the dtype and device of x"),
        (torch.zeros(3, 2, device="meta"), torch.zeros(3, 1), ValueError, "y must have the dtype and device"),
    ],
)
def test_wrong_tensors_are_named(x, y, error, message):
    with pytest.raises(error, match=message):
        Dataset(x, y)


@pytest.mark.parametrize("info", [{"t": torch.zeros(1)}, {"v": math.nan}, {"f": len}])
def test_info_must_be_json(info):
    with pytest.raises(TypeError, match="info must hold only what JSON can"):
        Dataset(torch.zeros(1, 1), torch.zeros(1, 1), info=info)


def test_info_indices_must_fit():
    with pytest.raises(ValueError, match=r"each of the 2 samples, got 1"):
        Dataset(torch.zeros(2, 1), torch.zeros(2, 1), info={"indices": [7]})


def test_data_is_exported():
    assert cx.data.Dataset is Dataset

"""Synthetic tasks: targets, scale, noise, streams, and the EGOP against a large-sample AGOP of the target."""

from __future__ import annotations

import json
import math

import pytest
import torch

import catapult_ext as cx

TASKS = ("rank-2", "rank-3", "rank-4", "full-rank")
RAW_MEAN_SQUARE = {"rank-2": 1, "rank-3": 14, "rank-4": 4, "full-rank": 1}


def raw_target(task: str, x: torch.Tensor) -> torch.Tensor:
    """The formulas as the paper prints them, written out."""
    c = x.unbind(1)
    match task:
        case "rank-2":
            return c[0] * c[1]
        case "rank-3":
            return c[0] * c[1] * sum(c[:10])
        case "rank-4":
            return sum(math.prod(c[:j]) for j in range(1, 5))
        case _:
            return torch.linalg.vector_norm(x, dim=1) / math.sqrt(x.shape[1])


@pytest.mark.parametrize("target_std", [None, 1.0, 0.3])
@pytest.mark.parametrize("task", TASKS)
def test_target_is_the_scaled_formula(task, target_std):
    x = torch.randn(50, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = 1 if target_std is None else target_std / math.sqrt(RAW_MEAN_SQUARE[task])
    y = cx.data.multi_index_target(task, x, target_std)
    torch.testing.assert_close(y, scale * raw_target(task, x)[:, None], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("task", TASKS)
def test_targets_have_the_stated_mean_square(task):
    x = torch.randn(400_000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    squares = cx.data.multi_index_target(task, x, 0.5).square()
    error = squares.std().item() / math.sqrt(len(x))
    assert error < 0.02 * 0.25
    assert abs(squares.mean().item() - 0.25) < 5 * error
    mean = cx.data.multi_index_target(task, x, None).mean().item()
    assert abs(mean) < 0.05 if task != "full-rank" else abs(mean - 1) < 0.05


@pytest.mark.parametrize("target_std", [None, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_egop_is_the_large_sample_agop_of_the_target(task, target_std):
    """Each entry within 5.5 standard errors of its sample mean; 144 entries, so a false alarm has odds of 5e-6."""
    n, d = 400_000, 12
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (g,) = torch.autograd.grad(cx.data.multi_index_target(task, x, target_std).sum(), x)  # [n, d]
    agop = g.T @ g / n
    square = g.square()
    error = ((square.T @ square / n - agop.square()) / n).sqrt()
    exact = cx.data.egop(task, d, target_std)
    assert exact.dtype == torch.float64
    assert error.max() < 0.02 * exact.max()  # the sample is large enough to tell wrong entries
    assert ((agop - exact).abs() <= 5.5 * error).all()  # where the target is flat both sides are exactly 0


@pytest.mark.parametrize(("task", "d"), [("rank-2", 2), ("rank-3", 10), ("rank-4", 4)])
def test_egop_of_a_polynomial_is_the_exact_integral(task, d):
    """Gauss-Hermite quadrature with three nodes per coordinate is exact for the degrees that occur (4)."""
    nodes = torch.tensor([-math.sqrt(3), 0, math.sqrt(3)], dtype=torch.float64)
    weights = torch.tensor([1, 4, 1], dtype=torch.float64) / 6
    grid = torch.cartesian_prod(*[nodes] * d).requires_grad_()  # [3^d, d]
    mass = torch.cartesian_prod(*[weights] * d).prod(1)  # [3^d]
    (g,) = torch.autograd.grad(cx.data.multi_index_target(task, grid, None).sum(), grid)
    torch.testing.assert_close(g.T @ (g * mass[:, None]), cx.data.egop(task, d, None), rtol=1e-12, atol=1e-12)
    mean_square = (cx.data.multi_index_target(task, grid, 0.5).square()[:, 0] * mass).sum()
    assert mean_square.item() == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(("task", "rank"), [("rank-2", 2), ("rank-3", 3), ("rank-4", 4), ("full-rank", 100)])
def test_egop_has_the_rank_of_its_name(task, rank):
    g = cx.data.egop(task)
    assert g.shape == (100, 100)
    assert torch.equal(g, g.T)
    assert torch.linalg.matrix_rank(g, hermitian=True) == rank


def test_egop_of_rank_2_is_the_papers():
    expected = torch.zeros(100, 100, dtype=torch.float64)
    expected[0, 0] = expected[1, 1] = 1
    assert torch.equal(cx.data.egop("rank-2"), expected)


@pytest.mark.parametrize("task", TASKS)
def test_split_shapes_and_noise(task):
    split = cx.data.multi_index(task, 3000, 7, 11, d=15, noise_std=0.2, dtype=torch.float64)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [3000, 7, 11]
    x, y = split.train[:]
    assert x.shape == (3000, 15)
    assert y.shape == (3000, 1)
    noise = y - cx.data.multi_index_target(task, x)
    assert noise.std().item() == pytest.approx(0.2, rel=5 / math.sqrt(2 * 3000))
    assert abs(noise.mean().item()) < 5 * 0.2 / math.sqrt(3000)
    assert abs(torch.corrcoef(torch.cat([noise, y - noise], 1).T)[0, 1].item()) < 5 / math.sqrt(3000)
    covariance = torch.cov(x.T)
    assert (covariance - torch.eye(15, dtype=torch.float64)).abs().max() < 5.5 * math.sqrt(2 / 3000)
    quiet = cx.data.multi_index(task, 9, 0, 0, d=15, noise_std=0.0, dtype=torch.float64).train
    torch.testing.assert_close(quiet.y, cx.data.multi_index_target(task, quiet.x), rtol=1e-14, atol=1e-14)


def test_sizes_do_not_change_each_other():
    small = cx.data.multi_index("rank-2", 5, 6, 7, seed=3)
    large = cx.data.multi_index("rank-2", 50, 0, 70, seed=3)
    assert torch.equal(large.train.x[:5], small.train.x)
    assert torch.equal(large.train.y[:5], small.train.y)
    assert torch.equal(large.test.y[:7], small.test.y)
    assert large.validation is None
    other = cx.data.multi_index("rank-2", 5, 6, 7, seed=4)
    assert not torch.isin(other.train.x, small.train.x).any()


def test_parts_and_seeds_are_independent():
    parts = []
    for seed in (0, 1):
        split = cx.data.multi_index("rank-2", 400, 400, 400, d=20, seed=seed)
        parts += [part.x.flatten() for part in (split.train, split.validation, split.test)]
    correlation = torch.corrcoef(torch.stack(parts)) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(8000)


def test_info_is_json_and_complete():
    split = cx.data.multi_index("rank-3", 4, 2, 0, target_std=None, seed=9)
    info = json.loads(json.dumps(split.validation.info))
    assert info["task"] == "rank-3"
    assert info["split"] == "validation"
    assert info["target_std"] is None
    assert info["target_scale"] == 1.0
    assert info["seed"] == 9
    scaled = cx.data.multi_index("rank-3", 4, 0, 0).train.info
    assert scaled["target_scale"] == pytest.approx(1 / math.sqrt(14))


@pytest.mark.parametrize("outlier_scale", [2.0, 0.5])
def test_unit_sphere(outlier_scale):
    data = cx.data.unit_sphere(60, 9, outlier_scale, seed=1, dtype=torch.float64)
    assert data.x.shape == (60, 9)
    assert data.y.shape == (60, 1)
    expected = torch.ones(60, dtype=torch.float64)
    expected[data.info["outlier_index"]] = outlier_scale
    torch.testing.assert_close(data.x.norm(dim=1), expected, rtol=1e-14, atol=0)
    assert torch.equal(data.y[:, 0], expected)
    assert not torch.equal(data.x, cx.data.unit_sphere(60, 9, outlier_scale, seed=2, dtype=torch.float64).x)


def test_unit_sphere_is_uniform():
    x = cx.data.unit_sphere(20_000, 3, 1.0, dtype=torch.float64).x
    # Every coordinate of a uniform point on the sphere in three dimensions is uniform on [-1, 1].
    for coordinate in x.T:
        grid = torch.linspace(-1, 1, 41, dtype=torch.float64)
        distance = (torch.searchsorted(coordinate.sort().values, grid) / 20_000 - (grid + 1) / 2).abs().max()
        assert distance < 2.2 / math.sqrt(20_000)  # Kolmogorov-Smirnov, false alarm 1.3e-4 per axis


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "rank-5"}, "task must be one of rank-2, rank-3, rank-4, full-rank; got 'rank-5'"),
        ({"train": 0}, "train must be an integer of at least 1, got 0"),
        ({"validation": -1}, "validation must be an integer of at least 0, got -1"),
        ({"test": 2.0}, r"test must be an integer of at least 0, got 2\.0"),
        ({"d": 9}, "d must be at least 10 for rank-3, got 9"),
        ({"noise_std": -0.1}, r"noise_std must be finite and at least 0, got -0\.1"),
        ({"target_std": 0.0}, r"target_std must be finite and above 0, or None for the raw target; got 0\.0"),
        ({"target_std": math.inf}, "target_std must be finite and above 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    good = {"task": "rank-3", "train": 2, "validation": 0, "test": 0}
    cx.data.multi_index(**good)
    with pytest.raises(ValueError, match=message):
        cx.data.multi_index(**{**good, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"d": 0}, "d must be an integer of at least 1, got 0"),
        ({"outlier_scale": 0.0}, r"outlier_scale must be finite and above 0, got 0\.0"),
        ({"seed": "a"}, "seed must be an integer of at least 0, got 'a'"),
    ],
)
def test_wrong_sphere_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        cx.data.unit_sphere(**wrong)

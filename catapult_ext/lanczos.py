"""Block Lanczos with full reorthogonalisation: largest eigenpairs of a symmetric operator known by its products.

Letters: p rows of the operator, m vectors of the basis, k wanted pairs. A basis vector is a contiguous row [p].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from catapult_ext.eigen import TopEigh
from catapult_ext.errors import NonFinite, UnsupportedModule

__all__ = ["Product", "basis_size", "check_arguments", "largest"]

#: (v [p], out [p]): writes H v to out.
Product = Callable[[Tensor, Tensor], None]

#: Entries that are summed in the dtype of the vectors; sums of these sums are taken in float64. A float32 dot product
#: of 6 million entries in one piece is off by 2e-4, which an eigenvalue to 1e-4 cannot bear.
_PIECE = 1 << 16
#: Share of random direction in every start vector: any eigenvector has a part in it.
_RANDOM = 0.1
#: Of the random direction: numbers of one draw times numbers of another, since drawing p costs half a product.
_RANDOM_ROW = 1024
#: Vectors in a block: finds double eigenvalues, and takes about half the products of a block of ten for ten pairs.
_LEAST_BLOCK = 2
#: Memory comes in blocks of at most this (one vector where that is larger): beyond 32 MiB, and where one vector of
#: a large network shares a block, the C library asks the system anew each time, which costs more than the algebra.
_BLOCK_BYTES = 1 << 23
#: Bytes that basis and products may take beyond the smallest basis, and vectors that a restart waits for at most.
_BASIS_BYTES = 1 << 28
_LARGEST_BASIS = 256


def _inner(rows: Tensor, v: Tensor) -> Tensor:
    """Inner products [m] of rows [m, p] with v [p] in float64."""
    if v.is_cuda:
        return torch.stack([(row * v).sum(dtype=torch.float64) for row in rows])
    pieces = [a @ b for a, b in zip(rows.split(_PIECE, 1), v.split(_PIECE), strict=True)]
    return torch.stack(pieces).sum(0, dtype=torch.float64)


def _norm(v: Tensor) -> float:
    return float(_inner(v[None], v)) ** 0.5


def _add_random(v: Tensor, share: float, seed: int) -> None:
    """Add to v [p] a direction with a part in every other one, of norm about `share`, from a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    width = min(len(v), _RANDOM_ROW)
    within = torch.randn(width, generator=generator, dtype=torch.float64)
    outer = torch.randn(-(-len(v) // width), generator=generator, dtype=torch.float64)
    outer *= share / (float(outer.norm()) * float(within.norm()))
    whole = len(v) - len(v) % width
    v[:whole].view(-1, width).addr_(outer[: whole // width].to(v), within.to(v))
    if whole < len(v):
        v[whole:] += outer[-1].to(v) * within[: len(v) - whole].to(v)


class _Rows:
    """Rows [p] that grow without moving."""

    def __init__(self, like: Tensor) -> None:
        self._p = like.shape[-1]
        self._like = like
        self._per_block = max(1, min(64, _BLOCK_BYTES // (self._p * like.element_size())))
        self._blocks: list[Tensor] = []

    def __getitem__(self, i: int) -> Tensor:
        block, row = divmod(i, self._per_block)
        while block >= len(self._blocks):
            self._blocks.append(self._like.new_empty((self._per_block, self._p)))
        return self._blocks[block][row]

    def inner(self, m: int, v: Tensor) -> Tensor:
        """Inner products [m] of the first m rows with v [p], in float64 on the host."""
        parts = [
            _inner(block[: m - first], v)
            for block, first in zip(self._blocks, range(0, m, self._per_block), strict=False)
        ]
        return torch.cat(parts).cpu() if parts else torch.zeros(0, dtype=torch.float64)

    def add_to(self, out: Tensor, weights: Tensor) -> None:
        """Out [p] += the first rows by their weights [m]."""
        for i, weight in enumerate(weights.tolist()):
            out.add_(self[i], alpha=weight)

    def write_to(self, out: Tensor, weights: Tensor) -> None:
        """Out [p] = the first rows by their weights [m], m >= 1."""
        torch.mul(self[0], float(weights[0]), out=out)
        for i, weight in enumerate(weights[1:].tolist(), 1):
            out.add_(self[i], alpha=weight)


class _Basis:
    """Orthonormal rows Q [m, p], their products W = Q H and the projection T = Q H Q^T [m, m] in float64."""

    def __init__(self, product: Product, like: Tensor, operator: str) -> None:
        self._product = product
        self._operator = operator
        self._like = like
        self._rows, self._images = _Rows(like), _Rows(like)
        self._projection = torch.zeros((0, 0), dtype=torch.float64)
        self.products = 0
        self.size = 0

    def slot(self) -> Tensor:
        """Memory [p] of the row behind the basis, for a vector that `append` then takes up in place."""
        return self._rows[self.size]

    def append(self, v: Tensor) -> bool:
        """Take up the part of v [p] that is orthogonal to the basis; False where nothing of it is left."""
        m, norm = self.size, _norm(v)
        if not norm > 0.0:
            return False
        q, left = self._rows[m], 1.0
        torch.mul(v, 1.0 / norm, out=q)
        while m and left:
            self._rows.add_to(q, -self._rows.inner(m, q))
            before, left = left, _norm(q)
            if (
                left > 0.5 * before
            ):  # else most of it was in the basis, and rounding has brought some of that back
                break
            if left < 8 * torch.finfo(v.dtype).eps:
                left = 0.0
        if not left:
            return False
        if m:
            q.mul_(1.0 / left)
        image = self._images[m]
        self._product(q, image)
        self.products += 1
        self.size = m + 1
        new = torch.zeros((m + 1, m + 1), dtype=torch.float64)
        new[:m, :m] = self._projection
        new[:, m] = self._rows.inner(m + 1, image)
        new[m, :m] = self._images.inner(m, q)
        if not bool(torch.isfinite(new[:, m]).all()):
            raise NonFinite(f"model: a product with {self._operator} is not finite")
        self._projection = new
        return True

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [m] of T, descending, and its eigenvectors as rows [m, m].

        Raises:
            UnsupportedModule: T is not symmetric, so that the products are not those of the operator.
        """
        t = self._projection
        skew, size = float((t - t.t()).abs().max()), float(t.abs().max())
        if skew > size * torch.finfo(self._like.dtype).eps ** (1 / 3):
            raise UnsupportedModule(
                f"model: products with {self._operator} are not symmetric ({skew / size:.1e} of their size), so that "
                "the backward of one of its operations is not the derivative of its forward, or is itself "
                "differentiated wrongly"
            )
        values, vectors = torch.linalg.eigh((t + t.t()) / 2)
        return values.flip(0), vectors.t().flip(0)

    def remainder(self, value: Tensor, weights: Tensor, out: Tensor) -> float:
        """Write H v - value v to out [p] for v = weights [m] Q; its norm."""
        self._images.write_to(out, weights)
        self._rows.add_to(out, -value * weights)
        return _norm(out)

    def vector(self, weights: Tensor, out: Tensor) -> None:
        """Write weights [m] Q to out [p], of norm 1 and with a positive component of largest magnitude."""
        self._rows.write_to(out, weights)
        low, high = torch.aminmax(out)
        out.mul_((1.0 if bool(high >= -low) else -1.0) / _norm(out))

    def shrink(self, values: Tensor, weights: Tensor) -> None:
        """Keep the span of these Ritz vectors [l, m] alone: a restart that costs no product."""
        rows, images = _Rows(self._like), _Rows(self._like)
        for i, row in enumerate(weights):
            self._rows.write_to(rows[i], row)
            self._images.write_to(images[i], row)
        self._rows, self._images = rows, images
        self.size, self._projection = len(values), torch.diag(values)


def check_arguments(
    k: int, tol: float | None, start: Tensor | TopEigh | None, *, rows: int, like: Tensor
) -> Tensor:
    """Arguments of the functions that find eigenpairs of an operator with `rows` rows.

    Args:
        k: pairs.
        tol: as given by the caller.
        start: as given by the caller.
        rows: p.
        like: a tensor of the dtype and on the device of the vectors.

    Returns:
        Start vectors as rows [m, p], m = 0 for None.

    Raises:
        TypeError, ValueError: one of them does not fit.
    """
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= rows:
        raise ValueError(f"k: expected an integer from 1 to {rows}, got {k!r}")
    if tol is not None and not (isinstance(tol, (int, float)) and 0 < tol < math.inf):
        raise ValueError(f"tol: expected a positive number or None, got {tol!r}")
    if start is None:
        return like.new_empty((0, rows))
    vectors = start.vectors if isinstance(start, TopEigh) else start
    if not isinstance(vectors, Tensor):
        raise TypeError(f"start: expected a tensor or a TopEigh, got {type(vectors).__name__}")
    if vectors.dtype != like.dtype:
        raise TypeError(f"start: expected {like.dtype} as the model, got {vectors.dtype}")
    if vectors.dim() != 2 or vectors.shape[0] != rows or vectors.device != like.device:
        raise ValueError(
            f"start: expected shape ({rows}, columns) on {like.device}, got {tuple(vectors.shape)} on {vectors.device}"
        )
    if not bool(torch.isfinite(vectors.sum())):
        raise ValueError("start: expected finite vectors, got a NaN or an infinity")
    return vectors.detach().t()


def _begin(slot: Tensor, start: Tensor, seed: int) -> Tensor:
    """The start vector of a number in a slot [p]: that row of start, if there is one, and a random part."""
    norm = _norm(start[seed]) if seed < start.shape[0] else 0.0
    if norm > 0.0:
        torch.mul(start[seed], 1.0 / norm, out=slot)
    else:
        slot.zero_()
    _add_random(slot, _RANDOM, seed)
    return slot


def _may_hide_copies(values: Tensor, residuals: Tensor, block: int, rounding: float) -> bool:
    """Whether an eigenvalue above the last of values [k] came up as often as a block can find it."""
    for i in range(len(values) - block):
        j = i + block - 1
        same = values[i] - values[j] <= residuals[i] + residuals[j] + rounding
        if bool(same) and bool(values[j] - values[-1] > residuals[j] + residuals[-1] + rounding):
            return True
    return False


def basis_size(p: int, k: int, columns: int, itemsize: int) -> int:
    """Vectors [p] that `largest` holds at most of its basis, and again of its products."""
    affordable = _BASIS_BYTES // (2 * p * itemsize)
    return min(p, max(32 + 4 * k, columns + 2 * k, min(_LARGEST_BASIS, affordable)))


def largest(
    product: Product,
    start: Tensor,
    k: int,
    *,
    tol: float,
    max_products: int,
    what: str,
    operator: str,
    stacklevel: int = 2,
) -> TopEigh:
    """Find the k largest (algebraic) eigenpairs of a symmetric operator.

    Each round multiplies residuals of wanted pairs that have not converged, as many as there were start vectors (a
    block), and solves the projected problem of everything multiplied so far. Every start vector gets a tenth of a
    random direction: an eigenvalue that exceeds the result by delta stays unseen only where its vector has a part of
    less than residual / delta in the start.

    A block of m vectors finds an eigenvalue at most m times. So where one comes up m times and smaller ones are
    wanted besides, everything is repeated with a block of k.

    Args:
        product: (v [p] of unit norm, out [p]): writes H v to out.
        start: [m, p], m >= 0 rows, of any norm; random ones are added up to 2 (up to k where k < 2).
        k: pairs, 1 <= k <= p.
        tol: largest residual, relative to |lambda_1|.
        max_products: where the iteration gives up, with a RuntimeWarning.
        what: name of the caller, for the warning.
        operator: what the products are with, for errors.
        stacklevel: of the warning, as for `warnings.warn` called here.

    Returns:
        TopEigh in the dtype of `start`; residuals are those of the vectors returned.

    Raises:
        UnsupportedModule: the operator is not symmetric.
        NonFinite: a product is not finite.

    Cost: some products; 8 p m operations and 2 p m numbers besides, m up to 32 + 4 k, or 256 where these take less
    than 256 MiB.
    """
    p, eps = start.shape[1], torch.finfo(start.dtype).eps
    capacity = basis_size(p, k, start.shape[0], start.element_size())
    block, spent = max(min(k, _LEAST_BLOCK), start.shape[0]), 0
    vectors = start.new_empty(
        (k, p)
    )  # remainders first, the result at last: fresh memory costs as much as algebra
    while True:
        basis, seeds = _Basis(product, start, operator), max(block, start.shape[0])
        for seed in range(seeds):
            basis.append(_begin(basis.slot(), start, seed))
        scale = 0.0
        while True:
            values, weights = basis.ritz()
            scale = max(scale, float(values.abs().max()))
            bound = max(tol * abs(float(values[0])), 16 * eps * scale)
            if basis.size + k > capacity and capacity < p:
                kept = k + (capacity - k) // 3
                basis.shrink(values[:kept], weights[:kept])
                weights = torch.eye(kept, dtype=torch.float64)
            wanted = range(min(k, basis.size))
            residuals = torch.tensor([basis.remainder(values[i], weights[i], vectors[i]) for i in wanted])
            unconverged = (residuals > bound).nonzero()[:, 0].tolist()
            if spent + basis.products >= max_products or basis.size == p:
                if basis.size >= k:
                    break
            elif any([basis.append(vectors[i]) for i in unconverged[:block]]):
                continue
            elif basis.size >= k:
                break
            # The start vectors span an invariant space of less than k dimensions.
            basis.append(_begin(basis.slot(), start, seeds))
            seeds += 1
        spent += basis.products
        if block >= k or unconverged or not _may_hide_copies(values[:k], residuals, block, 16 * eps * scale):
            break
        block = k
    if unconverged:
        warnings.warn(
            f"{what}: {len(unconverged)} of {k} eigenpairs have not converged after {spent} products: the "
            f"largest residual is {float(residuals.max()):.2e}, {bound:.2e} was asked for",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
    for i in range(k):
        basis.vector(weights[i], vectors[i])
    return TopEigh(values[:k].to(start), vectors.t(), residuals.to(start))

"""Block Lanczos with full reorthogonalisation: largest eigenpairs of a symmetric operator known by its products.

Letters: p rows of the operator, m vectors of the basis, k wanted pairs. A basis vector is a contiguous row [p].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from catapult_ext.eigen import TopEigh
from catapult_ext.errors import NonFinite, UnsupportedModule

__all__ = ["inner", "largest"]

#: Entries that are summed in the dtype of the vectors; sums of these sums are taken in float64. A float32 dot product
#: of 6 million entries in one piece is off by 2e-4, which an eigenvalue to 1e-4 cannot bear.
_PIECE = 1024
#: Share of random direction in every start vector: any eigenvector has a part in it.
_RANDOM = 0.1
#: Bytes that basis and products may take beyond the smallest basis, and vectors that a restart waits for at most.
_BASIS_BYTES = 1 << 28
_LARGEST_BASIS = 256


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products a b^T of rows [m, p] and [l, p] as float64 [m, l]."""
    p = a.shape[1]
    whole = p - p % _PIECE
    tail = a[:, whole:].double() @ b[:, whole:].double().t()  # [m, l]
    if not whole:
        return tail
    pieces = [
        rows[:, :whole].unflatten(1, (-1, _PIECE)).transpose(0, 1) for rows in (a, b)
    ]  # [p / 1024, m, 1024]
    return torch.bmm(pieces[0], pieces[1].transpose(1, 2)).sum(0, dtype=torch.float64) + tail


def _norm(v: Tensor) -> float:
    return float(inner(v[None], v[None])) ** 0.5


class _Basis:
    """Orthonormal rows Q [m, p], their products W = Q H and the projection T = Q H Q^T [m, m] in float64."""

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor, capacity: int) -> None:
        self._product = product
        self._capacity = capacity
        self._rows = like.new_empty((0, like.shape[-1]))
        self._images = self._rows
        self._projection = torch.zeros((0, 0), dtype=torch.float64)
        self._seed = 0
        self.products = 0
        self.size = 0

    def random(self) -> Tensor:
        """A unit vector [p] with a part in every direction, from a fixed seed.

        Numbers of one draw times numbers of another, since drawing p numbers costs half a product.
        """
        self._seed += 1
        generator = torch.Generator().manual_seed(self._seed)
        p = self._rows.shape[1]
        outer = torch.randn(-(-p // _PIECE), 1, generator=generator, dtype=torch.float64)
        within = torch.randn(1, min(p, _PIECE), generator=generator, dtype=torch.float64)
        v = (outer.to(self._rows) * within.to(self._rows)).view(-1)[:p]
        return v / _norm(v)

    def append(self, v: Tensor) -> bool:
        """Take up the part of a vector [p] that is orthogonal to the basis; False where nothing of it is left."""
        norm = _norm(v)
        if not 0.0 < norm < float("inf"):
            return False
        v = v / norm
        basis = self._rows[: self.size]
        for _ in range(2):
            v -= inner(basis, v[None])[:, 0].to(v) @ basis
            left = _norm(v)
            if left < 8 * torch.finfo(v.dtype).eps:
                return False
            v /= left
        self._store(v, self._product(v))
        return True

    def _store(self, v: Tensor, image: Tensor) -> None:
        m = self.size
        if m == self._rows.shape[0]:
            grown = self._rows.new_empty((min(self._capacity, 2 * m + 2), self._rows.shape[1]))
            images = torch.empty_like(grown)
            grown[:m], images[:m] = self._rows, self._images
            self._rows, self._images = grown, images
        self._rows[m], self._images[m] = v, image
        self.products += 1
        self.size = m + 1
        new = torch.zeros((m + 1, m + 1), dtype=torch.float64)
        new[:m, :m] = self._projection
        new[:, m] = inner(self._rows[: m + 1], image[None])[:, 0].cpu()
        new[m, :m] = inner(self._images[:m], v[None])[:, 0].cpu()
        if not bool(torch.isfinite(new).all()):
            raise NonFinite("model: a product with the Hessian of its loss is not finite")
        self._projection = new

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [m] of T, descending, and its eigenvectors as rows [m, m].

        Raises:
            UnsupportedModule: T is not symmetric, so that the products are not those of a Hessian.
        """
        t = self._projection
        skew, size = float((t - t.t()).abs().max()), float(t.abs().max())
        if skew > size * torch.finfo(self._rows.dtype).eps ** (1 / 3):
            raise UnsupportedModule(
                f"model: its second derivative is not symmetric ({skew / size:.1e} of its size), so that the backward "
                "of one of its operations is not the derivative of its forward, or is itself differentiated wrongly"
            )
        values, vectors = torch.linalg.eigh((t + t.t()) / 2)
        return values.flip(0), vectors.t().flip(0)

    def combine(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [l, p] of given weights [l, m], and their products."""
        weights = weights.to(self._rows)
        return weights @ self._rows[: self.size], weights @ self._images[: self.size]

    def shrink(self, values: Tensor, weights: Tensor) -> None:
        """Keep the span of these Ritz vectors alone: a restart that costs no product."""
        kept = len(values)
        self._rows[:kept], self._images[:kept] = self.combine(weights)
        self.size, self._projection = kept, torch.diag(values)


def largest(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    *,
    tol: float,
    max_products: int,
    what: str,
    stacklevel: int = 2,
) -> TopEigh:
    """Find the k largest (algebraic) eigenpairs of a symmetric operator.

    Each round multiplies the residuals of the wanted pairs that have not converged and solves the projected problem of
    everything multiplied so far. Every start vector gets a tenth of a random direction: an eigenvalue that exceeds the
    result by delta stays unseen only where its vector has a part of less than residual / delta in the start.

    Args:
        product: v [p] of unit norm to H v [p].
        start: [m, p], m >= 0 rows, of any norm; random ones are added up to k.
        k: pairs, 1 <= k <= p.
        tol: largest residual, relative to |lambda_1|.
        max_products: where the iteration gives up, with a RuntimeWarning.
        what: name of the caller, for the warning.
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
    affordable = _BASIS_BYTES // (2 * p * start.element_size())
    capacity = min(p, max(32 + 4 * k, start.shape[0] + 2 * k, min(_LARGEST_BASIS, affordable)))
    basis = _Basis(product, start, capacity)
    for row in start:
        norm = _norm(row)
        basis.append(row / norm + _RANDOM * basis.random() if norm > 0 else basis.random())
    while basis.size < k:
        basis.append(basis.random())
    scale = 0.0
    while True:
        values, weights = basis.ritz()
        scale = max(scale, float(values.abs().max()))
        vectors, images = basis.combine(weights[:k])  # [k, p]
        remainders = images - values[:k, None].to(vectors) * vectors
        residuals = inner(remainders, remainders).diagonal().sqrt().cpu()  # [k]
        bound = max(tol * abs(float(values[0])), 16 * eps * scale)
        open_pairs = [i for i in range(k) if float(residuals[i]) > bound]
        if basis.size + len(open_pairs) > capacity and capacity < p:
            kept = k + (capacity - k) // 3
            basis.shrink(values[:kept], weights[:kept])
        allowed = basis.products < max_products
        if not any([allowed and basis.size < p and basis.append(remainders[i]) for i in open_pairs]):
            break
    if open_pairs:
        warnings.warn(
            f"{what}: {len(open_pairs)} of {k} eigenpairs have not converged after {basis.products} products: the "
            f"largest residual is {float(residuals.max()):.2e}, {bound:.2e} was asked for",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
    return TopEigh(values[:k].to(start), _upright(vectors).t(), residuals.to(start))


def _upright(vectors: Tensor) -> Tensor:
    """Rows of unit norm whose component of largest magnitude is positive."""
    for v in vectors:
        low, high = torch.aminmax(v)
        v /= _norm(v) if bool(high >= -low) else -_norm(v)
    return vectors

"""Block Lanczos with full reorthogonalisation: largest eigenpairs of a symmetric operator known by its products.

Letters: p rows of the operator, m vectors of the basis, k wanted pairs. A basis vector is a contiguous row [p].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from catapult_ext.eigen import TopEigh
from catapult_ext.errors import NonFinite, UnsupportedModule

__all__ = ["Product", "check_arguments", "largest", "most_vectors"]

#: v [p] of unit norm to H v [p], in memory of its own.
Product = Callable[[Tensor], Tensor]

#: Entries of a vector that are worked on at a time: what one operation leaves of them, the next finds in the cache.
#: Sums over them are taken in the dtype of the vectors, sums of these sums in float64: a float32 dot product of
#: 6 million entries in one go is off by 2e-4, which an eigenvalue to 1e-4 cannot bear.
_PIECE = 1 << 17
#: Share of random direction in every start vector: any eigenvector has a part in it.
_RANDOM = 0.1
#: Of the random direction: numbers of one draw times numbers of another, since drawing p costs half a product.
_RANDOM_ROW = 1024
#: Vectors in a block: finds double eigenvalues, and takes about half the products of a block of ten for ten pairs.
_LEAST_BLOCK = 2
#: Bytes that the basis may take beyond the smallest, and vectors that a restart waits for at most.
_BASIS_BYTES = 1 << 28
_LARGEST_BASIS = 256


def _pieces(v: Tensor) -> Iterator[slice]:
    """Parts of the last dimension of v that are worked on at a time; all of it on a GPU, where launches cost more."""
    p = v.shape[-1]
    step = p if v.is_cuda else _PIECE
    return (slice(first, first + step) for first in range(0, p, step))


def _square(piece: Tensor) -> Tensor:
    """Sum of squares of v [p], 0-dim."""
    return piece.square().sum(dtype=torch.float64) if piece.is_cuda else piece @ piece


def _root_of_sum(squares: Iterable[Tensor]) -> float:
    """Norm of a vector by the sums of squares of its pieces, added in float64."""
    return float(torch.stack(list(squares)).sum(dtype=torch.float64)) ** 0.5


def _norm(v: Tensor) -> float:
    return _root_of_sum(_square(v[part]) for part in _pieces(v))


class _RandomDirection:
    """A direction [p] with a part in every other one, of norm about `share`, from a fixed seed.

    Numbers of one draw times numbers of another, since drawing p of them costs half a product.
    """

    def __init__(self, like: Tensor, share: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = min(like.shape[-1], _RANDOM_ROW)
        within = torch.randn(width, generator=generator, dtype=torch.float64)
        outer = torch.randn(-(-like.shape[-1] // width), generator=generator, dtype=torch.float64)
        outer *= share / (float(outer.norm()) * float(within.norm()))
        self._within, self._outer = within.to(like), outer.to(like)

    def add_to(self, piece: Tensor, first: int) -> None:
        """Add the entries from `first` on, a multiple of the length of a row, to a piece of a vector."""
        width = len(self._within)
        outer = self._outer[first // width :]
        whole = len(piece) // width
        piece[: whole * width].view(whole, width).addr_(outer[:whole], self._within)
        rest = piece[whole * width :]
        if len(rest):
            rest.add_(outer[whole] * self._within[: len(rest)])


def _inner(rows: Sequence[Tensor], v: Tensor) -> Tensor:
    """Inner products [m] of rows [p] with v [p], in float64 on the host."""
    if not rows:
        return torch.zeros(0, dtype=torch.float64)
    if v.is_cuda:
        return torch.stack([(row * v).sum(dtype=torch.float64) for row in rows]).cpu()
    found = [torch.stack([row[part] @ v[part] for row in rows]) for part in _pieces(v)]
    return torch.stack(found).sum(0, dtype=torch.float64)


def _combine(
    out: Tensor, rows: Sequence[Tensor], weights: Sequence[float], *, accumulate: bool = False
) -> float:
    """Out [p] = (with `accumulate`, +=) the rows [p], at least one, by their weights; the norm of what it becomes."""

    def squares() -> Iterator[Tensor]:
        for part in _pieces(out):
            piece = out[part]
            if not accumulate:
                torch.mul(rows[0][part], weights[0], out=piece)
            for i in range(0 if accumulate else 1, len(rows)):
                piece.add_(rows[i][part], alpha=weights[i])
            yield _square(piece)

    return _root_of_sum(squares())


class _Basis:
    """Orthonormal rows Q [m, p] and F [f, p] with H Q^T = Q^T T + F^T B: what is known of an operator H.

    The remainder of a Ritz vector w Q, T w = theta w, is F^T B w. So products are not kept: what is new in one becomes
    a row of F, the rows of F that remainders of wanted pairs lie in become rows of Q and are multiplied next, and f
    does not grow.
    """

    def __init__(self, product: Product, like: Tensor, operator: str) -> None:
        self._product = product
        self._operator = operator
        self._like = like
        self._rows: list[Tensor] = []  # Q, and F behind it
        self._projection = torch.zeros((0, 0), dtype=torch.float64)  # T [m, m]
        self._couplings = torch.zeros((0, 0), dtype=torch.float64)  # B [f, m]
        self._settled = True
        self.products = 0

    @property
    def size(self) -> int:
        """Rows m of Q."""
        return len(self._projection)

    @property
    def rest(self) -> int:
        """Rows f of F."""
        return len(self._couplings)

    def begin(self, start: Tensor, seed: int) -> None:
        """Add to F a start vector: row `seed` of start [m, p], if there is one, and a random part."""
        self._take_up(_start(start, seed))

    def expand(self, directions: Tensor) -> None:
        """Multiply the span of these directions in F [f, u], at least one of them not 0."""
        self._settle()
        f, m = self.rest, self.size
        turn, sizes, _ = torch.linalg.svd(directions / directions.norm(dim=0))
        new = int((sizes > 8 * torch.finfo(self._like.dtype).eps * sizes[0]).sum())
        if new < f:  # the first of the turned rows span the directions
            self._turn(turn.t())
        projection = torch.zeros((m + new, m + new), dtype=torch.float64)
        projection[:m, :m], projection[m:, :m] = self._projection, self._couplings[:new]
        self._projection = projection
        self._couplings = torch.cat([self._couplings[new:], torch.zeros((f - new, new))], 1)
        for i in range(m, m + new):
            inner, left = self._take_up(self._product(self._rows[i]))
            self.products += 1
            projection[:, i] = inner[: self.size]
            self._couplings[: len(inner) - self.size, i] = inner[self.size :]
            if left:
                self._couplings[-1, i] = left

    def _turn(self, turn: Tensor) -> None:
        """Replace F by turn [f, f], which is orthogonal, times F."""
        rows = self._rows[self.size :]
        weights = turn.to(self._like)
        for part in _pieces(self._like):
            turned = weights @ torch.stack([row[part] for row in rows])
            for row, piece in zip(rows, turned, strict=True):
                row[part] = piece
        self._couplings = turn @ self._couplings

    def _take_up(self, v: Tensor) -> tuple[Tensor, float]:
        """Make what is new in v [p], which is written over, a row of F.

        Returns:
            Inner products [m + f] of v with the rows of Q and of F, and the norm of what was new; 0 for nothing.
        """
        self._settle()
        norm, eps = math.nan, torch.finfo(v.dtype).eps
        inner = torch.zeros(len(self._rows), dtype=torch.float64)
        while True:
            found = _inner(self._rows, v)
            left = _combine(v, self._rows, (-found).tolist(), accumulate=True)
            if not math.isfinite(left):
                raise NonFinite(f"model: a product with {self._operator} is not finite")
            inner += found
            if math.isnan(norm):
                norm = before = math.hypot(float(found.norm()), left)
            if left > 0.5 * before or left > 1024 * eps * norm:
                self._settled = left > 0.5 * before
                break
            if left <= 8 * eps * norm:
                return inner, 0.0
            before = left  # nearly all of it was in the rows, and rounding has brought some of that back
        self._rows.append(v.mul_(1.0 / left))
        self._couplings = torch.cat([self._couplings, torch.zeros((1, self.size))])
        return inner, left

    def _settle(self) -> None:
        """Make the last row orthogonal to rounding, where little was left of its vector: only if anything follows."""
        if self._settled:
            return
        *others, row = self._rows
        inner = _inner(others, row)
        norm = _combine(row, others, (-inner).tolist(), accumulate=True)
        row.mul_(1.0 / norm)
        coupling = self._couplings[-1].clone()
        self._projection += torch.outer(inner[: self.size], coupling)
        self._couplings[:-1] += torch.outer(inner[self.size :], coupling)
        self._couplings[-1] = norm * coupling
        self._settled = True

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

    def remainders(self, weights: Tensor) -> Tensor:
        """What H takes out of Q from Ritz vectors, weights [l, m] Q, as columns [f, l] of their parts in F."""
        return self._couplings @ weights.t()

    def vectors(self, weights: Tensor) -> Tensor:
        """Weights [k, m] Q as rows [k, p] of norm 1, largest components positive. The last call: F may be lost."""
        if len(weights) == 1 and self.rest:
            out = self._rows[-1][None]  # needs no memory of its own
        else:
            out = self._like.new_empty((len(weights), self._like.shape[-1]))
        for v, row in zip(out, weights, strict=True):
            norm = _combine(v, self._rows[: self.size], row.tolist())
            low, high = torch.aminmax(v)
            v.mul_((1.0 if bool(high >= -low) else -1.0) / norm)
        return out

    def shrink(self, values: Tensor, weights: Tensor) -> None:
        """Keep the span of these Ritz vectors [l, m] alone: a restart that costs no product."""
        rows = [self._like.new_empty(self._like.shape[-1]) for _ in values]
        for row, ritz in zip(rows, weights.tolist(), strict=True):
            _combine(row, self._rows[: self.size], ritz)
        self._rows[: self.size] = rows
        self._couplings = self.remainders(weights)
        self._projection = torch.diag(values)


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


def _start(start: Tensor, seed: int) -> Tensor:
    """The start vector [p] of a number: that row of start [m, p], if there is one, and a random part."""
    row = start[seed] if seed < start.shape[0] else None
    norm = 0.0 if row is None else _norm(row)
    random = _RandomDirection(start, _RANDOM, seed)
    out = start.new_empty(start.shape[1])
    for part in _pieces(out):
        piece = out[part]
        if row is not None and norm > 0.0:
            torch.mul(row[part], 1.0 / norm, out=piece)
        else:
            piece.zero_()
        random.add_to(piece, part.start)
    return out


def _may_hide_copies(values: Tensor, residuals: Tensor, block: int, rounding: float) -> bool:
    """Whether an eigenvalue above the last of values [k] came up as often as a block can find it."""
    for i in range(len(values) - block):
        j = i + block - 1
        same = values[i] - values[j] <= residuals[i] + residuals[j] + rounding
        if bool(same) and bool(values[j] - values[-1] > residuals[j] + residuals[-1] + rounding):
            return True
    return False


def _capacity(p: int, k: int, columns: int, itemsize: int) -> int:
    """Vectors [p] of the basis that a restart waits for."""
    affordable = _BASIS_BYTES // (p * itemsize)
    return min(p, max(32 + 4 * k, columns + 2 * k, min(_LARGEST_BASIS, affordable)))


def _kept(capacity: int, k: int) -> int:
    """Ritz vectors that a restart keeps."""
    return k + (capacity - k) // 3


def _block(k: int, columns: int) -> int:
    """Vectors that are multiplied in a round at first, k of them where that turns out to be needed."""
    return max(min(k, _LEAST_BLOCK), columns)


def most_vectors(p: int, k: int, columns: int, itemsize: int) -> int:
    """Vectors [p] that `largest` holds at a time, the result among them: basis, what is new, and a restart's."""
    capacity, new = _capacity(p, k, columns, itemsize), max(k, _block(k, columns))
    return capacity + new + 1 + max(k, _kept(capacity, k) + new if capacity < p else 0)


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

    Each round multiplies remainders of wanted pairs that have not converged, as many as there were start vectors (a
    block), and solves the projected problem of everything multiplied so far. Every start vector gets a tenth of a
    random direction: an eigenvalue that exceeds the result by delta stays unseen only where its vector has a part of
    less than residual / delta in the start.

    A block of m vectors finds an eigenvalue at most m times. So where one comes up m times and smaller ones are
    wanted besides, everything is repeated with a block of k.

    Args:
        product: v [p] of unit norm to H v [p], a tensor that nothing else holds.
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

    Cost: some products, 8 p m operations for each, and p m numbers, m up to 32 + 4 k, or 256 where these take less
    than 256 MiB.

    Source: Wu and Simon 2000 (thick restarts); in blocks, of which only the directions that are needed are multiplied.
    """
    p, eps = start.shape[1], torch.finfo(start.dtype).eps
    capacity = _capacity(p, k, start.shape[0], start.element_size())
    block, spent = _block(k, start.shape[0]), 0
    while True:
        basis, seeds = _Basis(product, start, operator), max(block, start.shape[0])
        for seed in range(seeds):
            basis.begin(start, seed)
        basis.expand(torch.eye(basis.rest, dtype=torch.float64))
        scale = 0.0
        while True:
            values, weights = basis.ritz()
            scale = max(scale, float(values.abs().max()))
            bound = max(tol * abs(float(values[0])), 16 * eps * scale)
            if basis.size + k > capacity and capacity < p:
                kept = _kept(capacity, k)
                basis.shrink(values[:kept], weights[:kept])
                weights = torch.eye(kept, dtype=torch.float64)
            remainders = basis.remainders(weights[:k])
            residuals = remainders.norm(dim=0)
            unconverged = (residuals > bound).nonzero()[:, 0].tolist()
            if spent + basis.products >= max_products or basis.size == p:
                if basis.size >= k:
                    break
            elif unconverged:
                basis.expand(remainders[:, unconverged[:block]])
                continue
            elif basis.size >= k:
                break
            # The start vectors span an invariant space of less than k dimensions.
            basis.begin(start, seeds)
            basis.expand(torch.eye(basis.rest, dtype=torch.float64)[:, -1:])
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
    return TopEigh(values[:k].to(start), basis.vectors(weights[:k]).t(), residuals.to(start))

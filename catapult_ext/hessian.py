"""Sharpness: largest eigenpairs of the Hessian of the loss."""

from __future__ import annotations

from torch import Tensor, nn

from catapult_ext.eigen import TopEigh
from catapult_ext.lanczos import check_arguments
from catapult_ext.observe.hessian import LossHessian, kernel_vectors
from catapult_ext.observe.inputs import Inputs, check_inputs
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.outputs import check_target

__all__ = ["hessian_top"]


def hessian_top(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    k: int = 1,
    *,
    start: Tensor | TopEigh | None = None,
    tol: float | None = None,
) -> TopEigh:
    """Find the k largest (algebraic) eigenpairs of the Hessian of the mean squared error.

    The loss is the mean over all n c entries of (f - y)^2, without a factor 1/2. Products with the Hessian are exact
    (a second backward through the first); the iteration is block Lanczos with full reorthogonalisation. At a kink
    (ReLU at 0) the derivatives are those that PyTorch defines. Attention takes its plain formula, since the fused one
    has no second derivative. Products that are not symmetric are refused; a custom autograd function whose backward
    hides a symmetric part of its own derivative (a saved tensor detached) cannot be noticed.

    Args:
        model: output (n,) or (n, c), float32 or float64; left exactly as found. In training mode BatchNorm couples
            the samples and the Hessian is that of the loss of this batch.
        x: samples [n, ...].
        y: targets [n, c], or [n] for one output; dtype of the model.
        k: pairs, 1 <= k <= p.
        start: vectors [p, columns] of an earlier step, or its TopEigh; each column costs a product. It changes the
            cost, and the result within the tolerance. None begins with J^T u for the top eigenvectors u of the tangent
            kernel (with random vectors where the kernel has over 4096 rows or costs a backward each), which near
            interpolation are close: H = 2 / (n c) J^T J + a part proportional to the residuals f - y.
        tol: largest residual allowed, relative to |lambda_1|. The error of an eigenvalue is at most its residual, and
            about residual^2 / gap: 1e-2 gives the value to 1e-4 where it stands out, in 2 products a step of training.
            Default 1e-4 for float32 and 1e-8 for float64. Where |lambda_1| is small beside the largest |eigenvalue|
            met, 16 roundings of that are allowed.

    Returns:
        TopEigh: values (k,), vectors (p, k) flat over the parameters that require grad in the order of
        `model.named_parameters()`, residuals (k,). All residuals are <= tol |values[0]|, or a RuntimeWarning says that
        they are not. An eigenvalue above values[k - 1] by delta can stay unseen only where its vector has a part of
        less than residual / delta in the start, a tenth of which is random: with a loose `tol` and a `start`, such a
        vector comes up after some steps.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        UnsupportedModule: the forward draws random numbers, an operation has no second derivative, or the products
            are not symmetric.
        NonFinite: the output, the loss or a product is not finite.

    Cost: one forward, one backward, and the products, each about 1.8 training steps. Through a catapult, at tol 1e-2,
    2 products at most steps; 3 or 4 in the spike from J^T u, up to 5 from the vector of the last step. The graphs of
    both backwards stay alive; p numbers for each product besides, bounded by restarts. From `start` None also
    the kernel.

    Example:
        >>> top = hessian_top(model, x, y)
        >>> critical = 2 / top.values[0]

    Source: paper section 2, eta_crit = 2 / lambda_max(H).
    """
    state = ModelState(model, None)
    check_inputs(x, state.device)
    p = sum(parameter.numel() for parameter in state.parameters)
    rows = check_arguments(k, tol, start, rows=p, like=state.parameters[0])
    with state.untouched():
        hessian = LossHessian(state, x, lambda output: check_target(y, output))
        vectors = rows.t()
        if start is None:
            vectors = hessian.pull_back(kernel_vectors(state, x, hessian.output.shape[1], k))
        return hessian.top(k, vectors, tol)

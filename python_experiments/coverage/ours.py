"""What the engine says about a case: its routes, and how far all that it returns is from brute force in float64."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import catapult_ext as cx
from python_experiments.coverage import brute_force
from python_experiments.coverage.cases import Case
from python_experiments.coverage.cases.build import quiet

__all__ = ["FAST", "SAMPLES", "SINGLE", "TOLERANCES", "Found", "Reference", "measure", "reference"]

#: Routes that cost about as much as a training step.
FAST = frozenset({"gram", "tiles", "position grams", "unused"})

#: Samples of x and of z; no divisor of any width in the catalogue.
SAMPLES, _OTHERS = 7, 4

#: How far from brute force the result may be, relative to its own size.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
SINGLE = TOLERANCES[torch.float32]

_RATE = 0.05


@dataclass(frozen=True)
class Reference:
    """Brute force in float64.

    Attributes:
        rows: d f_ij / d w by parameter name, [n c, *shape].
        kernel: [n c, n c].
        cross: K(x, z) [n c, m c], None where a kernel of x with other samples is none of its own.
        output: f [n, c].
    """

    rows: dict[str, Tensor]
    kernel: Tensor
    cross: Tensor | None
    output: Tensor

    def kernel_error(self, kernel: Tensor) -> float:
        """Largest |K - K*|_pq / sqrt(K*_pp K*_qq) of K [n c, n c], or of its entries of equal outputs [n, n, c].

        Infinite where the shape is another one or an entry is not finite.
        """
        n, c = self.output.shape
        scale = self.kernel.diagonal().sqrt().clamp_min(1e-30)
        expected, size = self.kernel, torch.outer(scale, scale)
        if kernel.shape == (n, n, c):
            expected, size = (each.view(n, c, n, c).diagonal(dim1=1, dim2=3) for each in (expected, size))
        if kernel.shape != expected.shape or not kernel.isfinite().all():
            return float("inf")
        return float(((kernel.double() - expected).abs() / size).max())


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        refusal: the message of the `UnsupportedModule`, empty where there is a result.
        routes: of each parameter, by name, as `layer_report` says.
        rules: that applied to each parameter, or why none did.
        errors: of kernel, gradient, jacobian, cross kernel and parameters after a step, relative to their size.
    """

    refusal: str
    routes: dict[str, str]
    rules: dict[str, str]
    errors: dict[str, float]

    def verdict(self, case: Case, tolerance: float) -> str:
        """One of "exact", "refuses" (as the case says, with a remedy) and "wrong"."""
        if self.refusal or case.refused:
            return "refuses" if case.refused and re.search(case.refused, self.refusal) else "wrong"
        return "exact" if max(self.errors.values()) <= tolerance else "wrong"


def _eagerly(model: nn.Module, x: brute_force.Inputs) -> dict[str, Tensor]:
    with quiet(), torch.compiler.set_stance("force_eager"):
        return brute_force.rows_of(model, x)


def reference(case: Case) -> Reference:
    """Brute force of a case, on networks of its own."""
    x, z = (case.samples(n, seed, torch.float64) for n, seed in ((SAMPLES, 8), (_OTHERS, 9)))
    rows = _eagerly(case.model(torch.float64), x)
    columns = None if case.coupled else _eagerly(case.model(torch.float64), z)
    with quiet(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        output = brute_force.call(case.model(torch.float64), x)
    kernel = brute_force.kernel_of(rows)
    cross = None if columns is None else brute_force.kernel_of(rows, columns)
    return Reference(rows, kernel, cross, output.reshape(SAMPLES, -1))


def measure(case: Case, dtype: torch.dtype, exact: Reference | None = None) -> Found:
    """Observe a case and compare.

    Args:
        case: of the catalogue.
        dtype: of its network.
        exact: from `reference`, where it is at hand already.
    """
    model, x = case.model(dtype), case.samples(SAMPLES, 8, dtype)
    if case.refused:
        try:
            with case.context():
                cx.ntk(model, x)
        except cx.UnsupportedModule as error:
            return Found(str(error), {}, {}, {})
        return Found("", {}, {}, {})
    exact = exact or reference(case)
    c = exact.output.shape[1]
    # The residual is the cotangent: random, and of sizes that leave no wrong row unseen.
    y = torch.randn(SAMPLES, c, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = (2 / y.numel() * (exact.output - y.to(dtype).double())).reshape(-1)
    references = {name: torch.einsum("n,n...->...", weights, rows) for name, rows in exact.rows.items()}
    plain = {
        name: p.detach().double() - _RATE * references[name] if name in references else p.detach().double()
        for name, p in model.named_parameters()
    }
    with quiet():
        observation = cx.observe(model, x, y.to(dtype))
        errors = {
            "kernel": exact.kernel_error(_kernel(observation.kernel)),
            "gradient": _norms(observation.gradients(), references),
            "jacobian": _jacobian(cx.jacobian(model, x), exact),
        }
        if exact.cross is not None:
            cross = cx.ntk(model, x, case.samples(_OTHERS, 9, dtype))
            errors["cross kernel"] = brute_force.relative(_kernel(cross), exact.cross)
        observation.step_(_RATE)
        errors["step"] = _norms(dict(model.named_parameters()), plain)
    report = observation.layer_report
    return Found("", {row.name: row.route for row in report}, {row.name: row.rule for row in report}, errors)


def _kernel(found: object) -> Tensor:
    assert isinstance(found, Tensor)
    return found.double()


def _norms(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest norm of a difference, relative to the largest norm."""
    if got.keys() != expected.keys():
        return float("inf")
    largest = max(float(tensor.norm()) for tensor in expected.values())
    return (
        max(float((got[name].detach().double() - tensor).norm()) for name, tensor in expected.items())
        / largest
    )


def _jacobian(got: Tensor, exact: Reference) -> float:
    rows = torch.cat([brute_force.flat_rows(each) for each in exact.rows.values()], 1)
    return brute_force.relative(got.double().flatten(0, 1), rows)

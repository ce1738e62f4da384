"""Other tools on the same networks, each as its documentation says to compute the tangent kernel with it.

None of them is needed by anything else: a peer is imported when its column is filled, where it is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, nn

from catapult_ext.observe.inputs import Inputs
from python_experiments.coverage.brute_force import call

__all__ = ["PEERS", "PIP", "NotApplicable", "Peer", "versions"]


class NotApplicable(Exception):
    """The tool itself has not been asked: what has to be done before, which is no part of it, is not possible."""


@dataclass(frozen=True)
class Peer:
    """A tool beside ours.

    Attributes:
        name: of the column.
        packages: what pip calls its distributions.
        kernel: of a model and its samples, [n c, n c] with index i c + j, or [n, n, c] where the tool only gives
            entries of equal outputs.
        how: the calls, for the page.
    """

    name: str
    packages: tuple[str, ...]
    kernel: Callable[[Any, Inputs], Tensor]
    how: str


def versions(peer: Peer) -> dict[str, str] | None:
    """Installed versions by distribution, None where one is missing."""
    try:
        return {package: version(package) for package in peer.packages}
    except PackageNotFoundError:
        return None


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gram(rows: list[Tensor]) -> Tensor:
    """J J^T of per-sample gradients [n, c, *shape]."""
    flat = torch.cat([r.reshape(r.shape[0] * r.shape[1], -1) for r in rows], 1)
    return flat @ flat.T


def _per_sample(model: nn.Module, attribute: str, n: int) -> list[Tensor]:
    """What a backward has left in an attribute of each parameter: per-sample gradients [n, *shape].

    A parameter without it that has no gradient either is one that the output does not depend on.
    """
    unused = lambda p: getattr(p, attribute, None) is None and p.grad is None  # noqa: E731
    rows = [
        p.new_zeros(n, *p.shape) if unused(p) else getattr(p, attribute) for p in _trainable(model).values()
    ]
    if any(row is None for row in rows):
        raise NotImplementedError(f"no {attribute} of a parameter that has a gradient")
    return rows


class _Flat(nn.Module):
    """A network of one argument with an output [n, c], for tools that know no other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Tensor:
        """See the class."""
        output = call(self.model, x)
        return output.reshape(len(output), -1)


def _of_one_sample(model: nn.Module) -> Callable[[dict[str, Tensor], Inputs], Tensor]:
    """(parameters, one sample) to its outputs [c], by `torch.func.functional_call`."""

    def function(parameters: dict[str, Tensor], x: Inputs) -> Tensor:
        one = torch.utils._pytree.tree_map(lambda part: part.unsqueeze(0), x)
        arguments, named = (
            ((), one) if isinstance(one, dict) else (one if isinstance(one, tuple) else (one,), {})
        )
        return torch.func.functional_call(model, parameters, arguments, named).reshape(-1)

    return function


def _jacrev(model: nn.Module, x: Inputs) -> Tensor:
    jacobian = torch.func.vmap(torch.func.jacrev(_of_one_sample(model)), (None, 0))
    return _gram(list(jacobian(_trainable(model), x).values()))


def _ntk_vp(model: nn.Module, x: Inputs) -> Tensor:
    function, parameters = _of_one_sample(model), _trainable(model)

    def block(one: Inputs, other: Inputs) -> Tensor:
        output, pull = torch.func.vjp(lambda p: function(p, one), parameters)

        def column(cotangent: Tensor) -> Tensor:
            return torch.func.jvp(lambda p: function(p, other), (parameters,), pull(cotangent))[1]

        identity = torch.eye(output.numel(), dtype=output.dtype)
        return torch.func.vmap(column)(identity)  # [c of one, c of other]

    pairs = torch.func.vmap(torch.func.vmap(block, (None, 0)), (0, None))(x, x)  # [n, n, c, c]
    return pairs.transpose(1, 2).flatten(2).flatten(0, 1)


def _nngeometry(model: nn.Module, x: Inputs) -> Tensor:
    from nngeometry.gram import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    names = list(x) if isinstance(x, dict) else None
    tensors = [x] if isinstance(x, Tensor) else list(x.values() if isinstance(x, dict) else x)

    def function(*parts: Tensor) -> Tensor:
        arguments: Any = parts[0] if isinstance(x, Tensor) else parts
        output = call(model, arguments if names is None else dict(zip(names, parts, strict=True)))
        return output.reshape(len(output), -1)

    loader = DataLoader(TensorDataset(*tensors), batch_size=len(tensors[0]))
    return GramMatrix(model, loader, function).to_torch().permute(1, 0, 3, 2).flatten(2).flatten(0, 1)


def _vivit(model: nn.Module, x: Inputs) -> Tensor:
    """Gram matrix of the GGN of the mean squared error, which is 2 / (n c) times the kernel, as a sum of its parts."""
    import backpack
    from vivit.extensions.secondorder.vivit import ViViTGGNExact

    model, loss = backpack.extend(model), backpack.extend(nn.MSELoss())
    total: list[Tensor] = []

    def add(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            if p.requires_grad and hasattr(p, "vivit_ggn_exact"):
                total.append(p.vivit_ggn_exact["gram_mat"]())

    output = call(model, x)
    with backpack.backpack(ViViTGGNExact(), extension_hook=add):
        loss(output, torch.zeros_like(output)).backward()
    gram = torch.stack(total).sum(0)  # [c, n, c, n]
    return gram.permute(1, 0, 3, 2).flatten(2).flatten(0, 1) * (output.numel() / 2)


def _backpack(model: nn.Module, x: Inputs) -> Tensor:
    import backpack
    from backpack.extensions import BatchGrad

    rows: list[list[Tensor]] = []
    outputs = 1
    while len(rows) < outputs:
        extended = backpack.extend(copy.deepcopy(model))
        output = call(extended, x)
        flat = output.reshape(len(output), -1)
        outputs = flat.shape[1]
        with backpack.backpack(BatchGrad()):
            flat[:, len(rows)].sum().backward()
        rows.append(_per_sample(extended, "grad_batch", len(flat)))
    return _gram([torch.stack(column, 1) for column in zip(*rows, strict=True)])


def _opacus(model: nn.Module, x: Inputs) -> Tensor:
    from opacus import GradSampleModule

    rows: list[list[Tensor]] = []
    outputs = 1
    while (
        len(rows) < outputs
    ):  # each output from a wrapper of its own: it is made for one backward after a forward
        wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
        output = call(wrapped, x)
        flat = output.reshape(len(output), -1)
        outputs = flat.shape[1]
        flat[:, len(rows)].sum().backward()
        rows.append(_per_sample(wrapped, "grad_sample", len(flat)))
    return _gram([torch.stack(column, 1) for column in zip(*rows, strict=True)])


def _curvlinops(model: nn.Module, x: Inputs) -> Tensor:
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator

    flat = _Flat(model)
    parameters = [p for p in flat.parameters() if p.requires_grad]
    with torch.no_grad():
        output = flat(x)
    options: dict[str, Any] = {} if isinstance(x, Tensor) else {"batch_size_fn": lambda _: len(output)}
    forward = JacobianLinearOperator(flat, parameters, [(x, output)], **options)
    back = TransposedJacobianLinearOperator(flat, parameters, [(x, output)], **options)
    return forward @ (back @ torch.eye(output.numel(), dtype=output.dtype))


def _asdl_class_wise(model: nn.Module, x: Inputs) -> Tensor:
    from asdl.kernel import empirical_class_wise_direct_ntk

    return empirical_class_wise_direct_ntk(_Flat(model), x)


def _asdl_implicit(model: nn.Module, x: Inputs) -> Tensor:
    from asdl.kernel import empirical_implicit_ntk

    return empirical_implicit_ntk(_Flat(model), x).transpose(1, 2).flatten(2).flatten(0, 1)


def _neural_tangents(model: nn.Module, x: Inputs) -> Tensor:
    import jax
    import neural_tangents as nt
    import numpy as np
    from torch2jax import t2j

    jax.config.update("jax_enable_x64", True)
    array = lambda t: jax.numpy.asarray(t.detach().numpy())  # noqa: E731
    with torch.no_grad():
        expected = call(copy.deepcopy(model), x)
    state = {name: array(t) for name, t in model.state_dict().items()}
    parameters = {name: state.pop(name) for name in _trainable(model)}
    z = (
        {name: array(t) for name, t in x.items()}
        if isinstance(x, dict)
        else torch.utils._pytree.tree_map(array, x)
    )
    try:
        translated = t2j(model)

        def function(p: dict[str, Any], z: Any) -> Any:
            arguments, named = ((), z) if isinstance(z, dict) else (z if isinstance(z, tuple) else (z,), {})
            output = translated(*arguments, **named, state_dict={**state, **p})
            return output.reshape(len(output), -1)

        got = torch.from_numpy(np.array(function(parameters, z)))
        same = torch.allclose(got, expected.reshape(len(expected), -1), rtol=1e-9, atol=1e-9)
    except Exception as error:
        raise NotApplicable(f"torch2jax does not translate the network: {error}") from error
    if not same:
        raise NotApplicable("torch2jax translates the network to another function")
    ntk = nt.empirical_ntk_fn(
        function, trace_axes=(), vmap_axes=None, implementation=nt.NtkImplementation.JACOBIAN_CONTRACTION
    )
    blocks = torch.from_numpy(np.array(ntk(z, None, parameters)))  # [n, n, c, c]
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "jacrev",
            ("torch",),
            _jacrev,
            "`torch.func`: J by `vmap(jacrev)` of `functional_call`, then J J^T",
        ),
        Peer("NTK-vp", ("torch",), _ntk_vp, "`torch.func`: `jvp` of `vjp` for every pair of samples"),
        Peer("nngeometry", ("nngeometry",), _nngeometry, "`GramMatrix`"),
        Peer(
            "vivit",
            ("vivit-for-pytorch", "backpack-for-pytorch"),
            _vivit,
            "`ViViTGGNExact` of the mean squared error, its Gram matrices added up",
        ),
        Peer("BackPACK", ("backpack-for-pytorch",), _backpack, "`BatchGrad` for each output, then J J^T"),
        Peer("Opacus", ("opacus",), _opacus, "`GradSampleModule` for each output, then J J^T"),
        Peer(
            "curvlinops",
            ("curvlinops-for-pytorch",),
            _curvlinops,
            "`JacobianLinearOperator` times its transpose times the identity",
        ),
        Peer(
            "ASDL class-wise",
            ("asdfghjkl",),
            _asdl_class_wise,
            "`empirical_class_wise_direct_ntk`, which gives entries of equal outputs",
        ),
        Peer("ASDL implicit", ("asdfghjkl",), _asdl_implicit, "`empirical_implicit_ntk`"),
        Peer(
            "neural-tangents",
            ("neural-tangents", "jax", "torch2jax"),
            _neural_tangents,
            "`empirical_ntk_fn`, Jacobian contraction, of what `torch2jax` makes of the network; where the two give "
            "different outputs the column says so, and it is no verdict on neural-tangents",
        ),
    )
}

#: For `pip install --no-deps`, where catapult_ext is installed already; none of it needs another torch.
PIP = (
    "nngeometry opacus asdfghjkl tqdm opt_einsum",
    "backpack-for-pytorch vivit-for-pytorch unfoldNd einops",
    "curvlinops-for-pytorch einconv linear_operator jaxtyping wadler_lindig mpmath",
    "neural-tangents jax==0.4.30 jaxlib==0.4.30 ml_dtypes torch2jax absl-py frozendict",
    "tensorflow-cpu tf2jax==0.3.5 astunparse flatbuffers gast google-pasta protobuf termcolor wrapt",
    "six grpcio keras optree namex libclang dm-tree",
)

"""Networks that hook-based tools get wrong, each as a function of a seed; all take x [n, 32]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Linear = nn.Linear


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = Linear(32, 8), Linear(8, 8), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(h)))))


class TiedTransposed(nn.Module):
    """A weight used as W^T h and as W h."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Linear(32, 8), Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(F.linear(torch.tanh(self.first(x)), self.first.weight.T)))


class Scaled(nn.Module):
    """Bare parameters in scaled products, one on the right-hand side untransposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(16, 32)), nn.Parameter(torch.randn(16, 1))
        self.b = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return -(torch.relu(F.linear(x, self.w * 0.3, self.b) / 2) @ (0.7 * self.v)) * 1.3


class Attention(nn.Module):
    """nn.MultiheadAttention: token-major rows inside, whatever batch_first says."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=batch_first), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x.view(-1, 4, 8)
        z = z if self.batch_first else z.transpose(0, 1)
        z = self.attention(z, z, z, need_weights=False)[0]
        z = z if self.batch_first else z.transpose(0, 1)
        return self.last(z.mean(1))


class Recurrent(nn.Module):
    """nn.LSTM: weights used once per position."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(8, 5, batch_first=True), Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x.view(-1, 4, 8))[0][:, -1])


class TokenMajor(nn.Module):
    """Tokens regrouped so that row t n + i belongs to sample i."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = Linear(8, 8), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x.view(-1, 4, 8).transpose(0, 1).reshape(-1, 8)
        return self.last(torch.tanh(self.a(z)).view(4, -1, 8).mean(0))


class Shuffled(nn.Module):
    """Samples in another order inside the network than outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = Linear(32, 8), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.flip(0)))
        return self.last(h.flip(0))


class Coupled(nn.Module):
    """Subtracts the batch mean: every output depends on every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = Linear(32, 8), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.last(torch.tanh(z - z.mean(0)))


class Bare(nn.Module):
    """Class token, position embedding and a scalar, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.token = nn.Parameter(torch.randn(1, 4, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.gain, self.a, self.last = nn.Parameter(torch.tensor(1.3)), Linear(8, 8), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x.view(-1, 4, 8) + self.position
        z = torch.cat([self.token.expand(len(z), -1, -1), z], 1)
        return self.last(torch.tanh(self.a(z) * self.gain).mean(1))


class Checkpointed(nn.Module):
    """Activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.zero, self.a, self.last = Linear(32, 32), nn.Sequential(Linear(32, 8), nn.Tanh()), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.a, self.zero(x), use_reentrant=self.reentrant))


class Mutated(nn.Module):
    """The input of a layer is changed in place after use: autograd itself refuses the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = Linear(32, 4), Linear(4, 4), Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.a(x)).clone()
        z = self.b(h)
        h.mul_(2)
        return self.last(z + 1.0)


class FedWithParameter(nn.Module):
    """A layer whose input is a parameter, expanded over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 6))
        self.first, self.key, self.last = Linear(32, 5), Linear(6, 5), Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.key(self.query.expand(len(x), -1))))


class Conjugated(nn.Module):
    """Activations in memory with the wrong sign: the imaginary part of a conjugate is a view that negates later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Linear(32, 2), Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.complex(h[:, :1], h[:, 1:]).conj().imag)


class Bilinear(nn.Module):
    """Two inputs for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Bilinear(12, 20, 5), Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.mix(x[:, :12], x[:, 12:])))


class Unused(nn.Module):
    """A layer that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle, self.last = Linear(32, 8), Linear(32, 8), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        return self.last(torch.tanh(self.a(x)))


class ScalarBelowCoupling(nn.Module):
    """A scalar parameter that only the exact fallback can treat."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.a, self.last = nn.Parameter(torch.tensor(0.7)), Linear(32, 8), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.gain
        return self.last(torch.tanh(h - h.mean(0)))


class Squeezed(nn.Module):
    """Output of shape (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = Linear(32, 8), Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.a(x))).squeeze(1)


class Embedded(nn.Module):
    """nn.Embedding on tokens derived from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.last = nn.Embedding(11, 6), Linear(6, 5), Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, :7].abs() * 10).long() % 11
        return self.last(torch.tanh(self.a(self.table(tokens))).mean(1))


def _frozen() -> nn.Module:
    model = nn.Sequential(Linear(32, 8), nn.Tanh(), Linear(8, 8), nn.Tanh(), Linear(8, 1))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def _parametrized() -> nn.Module:
    model = nn.Sequential(Linear(32, 8), nn.Tanh(), Linear(8, 8), nn.Tanh(), Linear(8, 1))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.spectral_norm(model[2])
    return model.eval()


def _conv(padding_mode: str = "zeros") -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)),
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode=padding_mode, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (1, 2), padding=(0, 1)),
        nn.Flatten(),
        nn.LazyLinear(1),
    )


def _batch_norm(training: bool) -> nn.Module:
    model = nn.Sequential(Linear(32, 8), nn.BatchNorm1d(8), nn.Tanh(), Linear(8, 1))
    return model.train(training)


def _outputs(features: int, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), Linear(features, 3))


EXACT: dict[str, Callable[[], nn.Module]] = {
    "in-place relu": lambda: nn.Sequential(
        Linear(32, 8), nn.ReLU(inplace=True), Linear(8, 8, bias=False), nn.ReLU(True), Linear(8, 1)
    ),
    "module called twice": Twice,
    "tied and transposed": TiedTransposed,
    "fed with a parameter": FedWithParameter,
    "pending negation": Conjugated,
    "scaled products": Scaled,
    "attention, batch first": lambda: Attention(True),
    "attention, sequence first": lambda: Attention(False),
    "attention, eval": lambda: Attention(True).eval(),
    "lstm": Recurrent,
    "token-major rows": TokenMajor,
    "shuffled samples": Shuffled,
    "parametrizations": _parametrized,
    "frozen layers": _frozen,
    "unused layer": Unused,
    "output (n,)": Squeezed,
    "layer norm": lambda: nn.Sequential(Linear(32, 8), nn.LayerNorm(8), nn.Tanh(), Linear(8, 1)),
    "embedding": Embedded,
    "bare parameters": Bare,
    "checkpoint": lambda: Checkpointed(False),
    "convolutions": _conv,
    "circular convolution": lambda: _conv("circular"),
    "batch norm, eval": lambda: _batch_norm(False),
    "batch norm, training": lambda: _batch_norm(True),
    "coupled samples": Coupled,
    "scalar below coupling": ScalarBelowCoupling,
    "three outputs": lambda: _outputs(8, Linear(32, 8), nn.ReLU(True), Linear(8, 8)),
    "three outputs, convolution": lambda: _outputs(
        16, nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Flatten()
    ),
    "three outputs, attention": lambda: _outputs(1, Attention(True)),
    "three outputs, batch norm": lambda: _outputs(8, Linear(32, 8), nn.BatchNorm1d(8)),
    "prelu": lambda: nn.Sequential(Linear(32, 8), nn.PReLU(8), Linear(8, 1)),
    "bilinear": Bilinear,
    "conv1d": lambda: nn.Sequential(nn.Unflatten(1, (4, 8)), nn.Conv1d(4, 3, 3), nn.Flatten(), Linear(18, 1)),
    "transposed convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Flatten(), Linear(128, 1)
    ),
}


def make(name: str, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A freshly initialised network, its lazy layers made."""
    torch.manual_seed(seed)
    model = EXACT[name]()
    training = model.training
    with torch.no_grad():
        model.eval()(torch.randn(2, 32))
    return model.train(training).to(dtype) if training else model.eval().to(dtype)

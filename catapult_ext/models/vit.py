"""Vision transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from catapult_ext.models.layers import (
    Parameterization,
    check_images,
    fix_layers,
    image_sides,
    positive_int,
)

__all__ = ["ViT"]


class PatchEmbedding(nn.Module):
    """Linear map of each patch, the class token before them, a position added to every token."""

    def __init__(
        self, kind: Parameterization, in_channels: int, patches: int, patch_size: int, width: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = kind.linear(in_channels * patch_size**2, width)
        self.class_token = kind.embedding(width)
        self.positions = kind.embedding(1 + patches, width)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (n, in_channels, height, width) to (n, 1 + patches, width), patches row by row."""
        s = self.patch_size
        patches = x.unfold(2, s, s).unfold(3, s, s)  # [n, channels, rows, columns, s, s]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [n, patches, channels s^2]
        h = self.linear(patches)  # [n, patches, width]
        return torch.cat([self.class_token.expand(len(h), 1, -1), h], 1) + self.positions


class SelfAttention(nn.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(width of a head)) V of each head, then a linear map."""

    def __init__(self, kind: Parameterization, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = kind.linear(width, 3 * width)
        self.output = kind.linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """`h` (n, tokens, width) to the same shape."""
        joint = self.queries_keys_values(h).unflatten(2, (3, self.heads, -1))  # [n, tokens, 3, heads, e]
        q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, tokens, e]
        # Written out: torch's fused attention has no second derivative and sums in no fixed order on CUDA, and
        # for the 65 tokens of a small image it is no faster.
        weights = torch.softmax(
            q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), 3
        )  # [n, heads, tokens, tokens]
        return self.output((weights @ v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention, then a two-layer ReLU network of each token, both behind LayerNorm and beside a shortcut."""

    def __init__(self, kind: Parameterization, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(kind, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.hidden = kind.linear(width, mlp_width)
        self.output = kind.linear(mlp_width, width)

    def forward(self, h: Tensor) -> Tensor:
        """`h` (n, tokens, width) to the same shape."""
        h = h + self.attention(self.norm1(h))
        return h + self.output(torch.relu(self.hidden(self.norm2(h))))


class TokenHead(nn.Module):
    """LayerNorm of the class token, linear output."""

    def __init__(self, kind: Parameterization, width: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = kind.linear(width, out_features)

    def forward(self, h: Tensor) -> Tensor:
        """`h` (n, tokens, width) to (n, out_features)."""
        return self.linear(self.norm(h[:, 0]))


class ViT(nn.Module):
    """Vision transformer of images (n, in_channels, height, width) to (n, out_features).

    Patches are mapped linearly, a class token is put before them and positions are added; then come `depth`
    blocks of attention and a ReLU network with LayerNorm before each (`nn.LayerNorm` as PyTorch initialises it, with
    gain and bias), and a linear output of the class token. No dropout. ViT-4 is the default: 4 blocks, patches
    of side 4.

    `self.layers` holds the embedding, the blocks and the output layer, which are what `fixed_layers` counts.

    Args:
        in_channels: channels of the images.
        image_size: side of square images, or (height, width), multiples of `patch_size`.
        width: features of a token, a multiple of `heads`.
        depth: transformer blocks.
        out_features: outputs c.
        patch_size: side of the patches.
        heads: attention heads.
        mlp_width: hidden units of each block's network; 4 `width` when None.
        parameterization: as in `FCN`. Class token and positions are N(0, 1) in both, as PyTorch initialises an
            `nn.Embedding`.
        bias_scale: as in `FCN`.
        weight_std: as in `FCN`; class token and positions too.
        fixed_layers: as in `FCN`.
        generator: as in `FCN`.

    Raises:
        ValueError: naming the argument that is out of range.

    Source: Dosovitskiy et al. 2021, with ReLU, which the paper uses throughout, in place of GELU.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int | tuple[int, int],
        width: int,
        depth: int = 4,
        out_features: int = 1,
        *,
        patch_size: int = 4,
        heads: int = 8,
        mlp_width: int | None = None,
        parameterization: str = "ntk",
        bias_scale: float = 0.0,
        weight_std: float = 1.0,
        fixed_layers: Iterable[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        rows, columns = self.image_size = image_sides(image_size)
        positive_int("width", width)
        positive_int("depth", depth)
        positive_int("out_features", out_features)
        positive_int("patch_size", patch_size)
        positive_int("heads", heads)
        if rows % patch_size or columns % patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size={patch_size} in height and width, "
                f"got {rows} x {columns}"
            )
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}, got {width}")
        mlp = 4 * width if mlp_width is None else positive_int("mlp_width", mlp_width)
        kind = Parameterization(parameterization, bias_scale, weight_std, generator)
        patches = (rows // patch_size) * (columns // patch_size)
        self.layers = nn.ModuleList([PatchEmbedding(kind, in_channels, patches, patch_size, width)])
        for _ in range(depth):
            self.layers.append(TransformerBlock(kind, width, heads, mlp))
        self.layers.append(TokenHead(kind, width, out_features))
        fix_layers(self.layers, fixed_layers)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (n, in_channels, height, width), in the dtype of the weights, to (n, c)."""
        h = check_images(x, self.in_channels, self.image_size)
        for layer in self.layers:
            h = layer(h)
        return h  # [n, c]

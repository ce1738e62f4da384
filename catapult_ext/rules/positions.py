"""Weights that are shared over positions: which of two exact routes to the kernel is cheaper, and the second one.

With features a_it and sensitivities b_it of T positions, the per-sample gradient is G_i = sum_t b_it a_it^T, and
K_ij = <G_i, G_j> = sum_ts (a_it . a_js) (b_it . b_js). Forming G costs T products for each sample and is right for
images and long sequences; the Gram matrices of positions cost T^2 for each pair and are right for few positions of
wide layers (512 channels on 4 x 4 maps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GRAMS", "TILES", "Sizes", "position_grams_"]

TILES, GRAMS = "tiles", "position grams"

# A number of the position Gram matrix is written, read and added to its sum in the time of so many multiply-adds
# (7 to 9 ns on one AVX-512 core of 30 GMAC/s).
_MACS_PER_ENTRY = 256


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the cost of a weight depends on.

    Attributes:
        n: samples.
        c: outputs.
        positions: T.
        fan_in: numbers in a_it that an A product reads; 0 where it is a comparison.
        width: numbers in b_it.
        tile_macs: multiply-adds of forming all G.
        entries: numbers of a G that are not zero for all samples.
        copied: numbers of a_it that have to be copied (unfolded) for a block.
        separable: False where a_it and b_it are not whole rows (groups), so that position Grams do not exist.
    """

    n: int
    c: int
    positions: int
    fan_in: int
    width: int
    tile_macs: float
    entries: int
    copied: int = 0
    separable: bool = True

    def choose(self, tile_bytes: int, element_size: int) -> tuple[str, float]:
        """The cheaper route that fits `tile_bytes`, and its multiply-adds (with what memory traffic is worth)."""
        rows = self.n * self.c
        tiles = self.tile_macs + rows * rows * self.entries / 2
        positions = self.n * self.positions
        grams = (positions**2 * self.fan_in + (positions * self.c) ** 2 * (self.width + _MACS_PER_ENTRY)) / 2
        fits = self.separable and self.block(tile_bytes, element_size) > 0
        return (GRAMS, grams) if fits and grams < tiles else (TILES, tiles)

    def block(self, tile_bytes: int, element_size: int) -> int:
        """Samples in a block of rows and of columns such that a block takes at most `tile_bytes`; 0 if none fit."""
        numbers = tile_bytes / element_size
        per_sample = 2 * self.positions * self.copied
        area = 2 * (self.positions * self.c) ** 2  # the product, and what its sums need
        # area s^2 + per_sample s <= numbers
        root = ((per_sample * per_sample + 4 * area * numbers) ** 0.5 - per_sample) / (2 * area)
        return min(self.n, int(root))


def position_grams_(
    kernel: Tensor, sizes: Sizes, block: int, product: Callable[[slice, slice], Tensor]
) -> None:
    """K += sum over pairs of positions, block by block; stays exactly symmetric.

    Args:
        kernel: [n c, n c].
        sizes: n, c and T.
        block: samples in a block.
        product: (samples I, samples J) to (A_I A_J^T) * (B_I B_J^T) [|I| T c, |J| T c], index (i T + t) c + j.
    """
    n, c, positions = sizes.n, sizes.c, sizes.positions
    for first in range(0, n, block):
        left = slice(first, min(n, first + block))
        rows = slice(left.start * c, left.stop * c)
        for second in range(0, first + 1, block):
            right = slice(second, min(n, second + block))
            columns = slice(right.start * c, right.stop * c)
            terms = product(left, right).view(-1, positions, c, right.stop - right.start, positions, c)
            part = terms.sum((1, 4)).flatten(2).flatten(0, 1)  # [|I| c, |J| c]
            if first == second:
                part = torch.tril(part)
                kernel[rows, columns] += part + torch.tril(part, -1).t()
            else:
                kernel[rows, columns] += part
                kernel[columns, rows] += part.t()

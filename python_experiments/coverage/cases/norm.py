"""Normalisation layers, BatchNorm in both modes."""

from __future__ import annotations

from torch import nn

from python_experiments.coverage.cases.build import Call, Case, end, exact, normal, seq

__all__ = ["CASES"]

_TOKENS, _MAPS, _VOLUMES = normal(4, 8), normal(2, 4, 4), normal(2, 4, 2, 2)

CASES: list[Case] = [
    exact("layer norm", lambda: seq(nn.Linear(32, 8), nn.LayerNorm(8), *end(8)), None, "LayerNorm"),
    exact("layer norm on tokens", lambda: seq(nn.Linear(8, 5), nn.LayerNorm(5), *end(20)), _TOKENS,
          "LayerNorm on tokens"),
    exact("layer norm over two dimensions", lambda: seq(nn.LayerNorm((4, 4)), *end(32, 2)), _MAPS),
    exact("layer norm without bias", lambda: seq(nn.LayerNorm(8, bias=False), *end(32)), _TOKENS),
    exact("layer norm, sequence first", lambda: Call(
        lambda m, x: m.last(m.norm(x.transpose(0, 1).contiguous()).tanh().mean(0)),
        norm=nn.LayerNorm(8), last=nn.Linear(8, 3),
    ), _TOKENS),
    exact("rms norm", lambda: seq(nn.Linear(8, 5), nn.RMSNorm(5), *end(20)), _TOKENS, "RMSNorm"),
    exact("rms norm over two dimensions", lambda: seq(nn.RMSNorm((4, 8)), *end(32, 3)), _TOKENS),
    exact("group norm", lambda: seq(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), *end(16)), _MAPS, "GroupNorm"),
    exact("group norm on vectors", lambda: seq(nn.GroupNorm(4, 32), *end(32, 2))),
    exact("group norm of volumes, three outputs", lambda: seq(nn.GroupNorm(1, 2), *end(32, 3)), _VOLUMES),
    exact("instance norm", lambda: seq(nn.InstanceNorm2d(2, affine=True), *end(32, 3)), _MAPS),
    exact("instance norm 1d", lambda: seq(nn.InstanceNorm1d(4, affine=True), *end(32)), _TOKENS),
    exact("instance norm 3d", lambda: seq(nn.InstanceNorm3d(2, affine=True), *end(32)), _VOLUMES),
    # A shift before it changes nothing, so that the biases of these convolutions have a gradient of zero.
    exact("instance norm behind convolutions", lambda: seq(
        nn.Conv2d(2, 3, 2, padding=1), nn.InstanceNorm2d(3, affine=True), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2),
        nn.InstanceNorm2d(2), *end(72, 2)), _MAPS),
    exact("instance norm, running statistics, training", lambda: seq(
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True), *end(32)), _MAPS),
    exact("instance norm, running statistics, eval", lambda: seq(
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True), *end(32, 2)).eval(), _MAPS),
    exact("batch norm, eval", lambda: seq(nn.Linear(32, 8), nn.BatchNorm1d(8), *end(8)).eval(), None, "BatchNorm eval"),
    exact("batch norm, eval, images", lambda: seq(nn.BatchNorm2d(2), *end(32, 3)).eval(), _MAPS),
    exact("batch norm, eval, sequences", lambda: seq(nn.BatchNorm1d(4), *end(32)).eval(), _TOKENS),
    exact("batch norm, eval, volumes", lambda: seq(nn.BatchNorm3d(2), *end(32)).eval(), _VOLUMES),
    exact("batch norm, training", lambda: seq(nn.Linear(32, 8), nn.BatchNorm1d(8), *end(8)), None,
          "BatchNorm training", slow=("rows",), coupled=True),
    exact("batch norm, training, images, three outputs", lambda: seq(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), *end(27, 3)), _MAPS, slow=("rows",), coupled=True),
    exact("batch norm, training, sequences", lambda: seq(nn.Linear(8, 5), nn.BatchNorm1d(4), *end(20)), _TOKENS,
          slow=("rows",), coupled=True),
    exact("batch norm, training, volumes, average of all steps", lambda: seq(
        nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, momentum=None), *end(9, 2)), _VOLUMES, slow=("rows",), coupled=True),
    exact("batch norm, training, no gain", lambda: seq(
        nn.Linear(32, 8), nn.BatchNorm1d(8, affine=False), *end(8, 2)), slow=("rows",), coupled=True),
    exact("batch norm without statistics, eval", lambda: seq(
        nn.Linear(32, 8), nn.BatchNorm1d(8, track_running_stats=False), *end(8)).eval(),
        slow=("rows",), coupled=True),
]  # fmt: skip

"""A training run in a run folder, for tests that interrupt it; as a script it makes runs in processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from training_reference import Recipe

import catapult_ext as cx


def model(kind: str) -> nn.Sequential:
    """The network that a run of this kind starts from."""
    return Recipe(torch.float32).model(norm=kind == "batchnorm")


def run(
    root: Path,
    kind: str,
    *,
    steps: int = 12,
    checkpoint_seconds: float = 0.0,
    network: nn.Module | None = None,
    **changes: object,
) -> cx.History:
    """Train in `root`: "gd" and "sgd" with relative rates and every recorder, "batchnorm" by GD."""
    torch.set_num_threads(1)
    recipe = Recipe(torch.float32)
    data = recipe.split()
    recorders: list[cx.Recorder] = [cx.BatchCriticalRate(), cx.Spectrum(k=2, every=3)]
    if kind != "batchnorm":
        recorders.append(cx.AGOPAlignment(reference=torch.eye(recipe.d), every=4))
    arguments: dict[str, object] = {
        "algorithm": cx.SGD(4) if kind == "sgd" else cx.GD(),
        "schedule": cx.Stepwise({0: 0.4, 3: 0.6, 7: 0.5}, relative=True),
        "recorders": recorders,
        "probe": data.train if kind == "sgd" else None,
        "stop": cx.Stop(max_steps=steps),
        "validate_every": 2,
        "seed": 3,
        **changes,
    }
    folder = cx.RunFolder(root, f"test/{kind}", {"kind": kind}, 3, checkpoint_seconds=checkpoint_seconds)
    return cx.train(network or model(kind), data, run=folder, **arguments)  # type: ignore[arg-type]


def only_folder(root: Path) -> Path:
    """The one run folder below `root`."""
    (config,) = root.glob("**/config.json")
    return config.parent


if __name__ == "__main__":
    # Each line of the input is a run to make, in a process of its own whose id is the answer: to fork one that
    # has imported everything takes milliseconds.
    for line in sys.stdin:
        root, kind, steps = line.split()
        process = os.fork()
        if process == 0:
            run(Path(root), kind, steps=int(steps), checkpoint_seconds=0.02)
            os._exit(0)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)

"""A training run in a run folder, for tests that interrupt it; as a script it makes runs in processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from training_reference import Recipe

import catapult_ext as cx

#: Steps between two records away from spikes, of the kinds that record densely around them.
SPARSE = 25


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
    """Train in `root`.

    "gd" and "sgd" with relative rates and every recorder, "batchnorm" by GD; "adam" on batches and "catapults", GD
    that is raised for catapults, record densely around spikes and keep tensors.
    """
    torch.set_num_threads(1)
    recipe = Recipe(torch.float32)
    data = recipe.split()
    rise = 20.0 if kind == "adam" else 1.5  # the losses of small batches scatter
    around = cx.AroundSpikes(before=10, after=2, every=SPARSE, rise=rise)
    recorders: list[cx.Recorder] = [cx.BatchCriticalRate()]
    if kind in ("adam", "catapults"):
        recorders += [cx.Spectrum(k=2, every=around), cx.AGOP(size=3, every=around)]
    else:
        recorders.append(cx.Spectrum(k=2, every=3))
    if kind in ("gd", "sgd"):
        recorders.append(cx.AGOPAlignment(reference=torch.eye(recipe.d), every=4))
    algorithms: dict[str, cx.Algorithm] = {"sgd": cx.SGD(4), "adam": cx.Adam(4)}
    schedules: dict[str, cx.Schedule] = {
        "adam": cx.Constant(0.05),
        "catapults": cx.CatapultSchedule(c=1.5, s=2),
    }
    arguments: dict[str, object] = {
        "algorithm": algorithms.get(kind, cx.GD()),
        "schedule": schedules.get(kind, cx.Stepwise({0: 0.4, 3: 0.6, 7: 0.5}, relative=True)),
        "recorders": recorders,
        "probe": data.train if kind in ("sgd", "adam") else None,
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

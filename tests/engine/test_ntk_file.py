"""Kernels in files: panel by panel, taken up again after a kill, never over another kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import brute_force
import numpy as np
import pytest
import torch
from networks import make
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import catapult_ext as cx
from catapult_ext.runs.files import UnwritableFile


def _x(n: int, seed: int = 3) -> Tensor:
    return torch.randn(n, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _notes(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".json").read_text())


@pytest.mark.parametrize("outputs", ["all", "trace", 1])
def test_panels_make_the_kernel(tmp_path: Path, outputs: str | int) -> None:
    model, x, z = make("three outputs, convolution", 1), _x(19), _x(7, seed=4)
    for name, others in (("k", ()), ("c", (z,))):
        whole = cx.ntk(model, x, *others, outputs=outputs)
        path = tmp_path / f"{name}.npy"
        with pytest.raises(ValueError, match=r"max_bytes: 1 is too small .* works is (\d+)") as caught:
            cx.ntk_file(model, x, path, *others, outputs=outputs, max_bytes=1)
        assert not list(tmp_path.glob(f"{name}*"))
        smallest = int(str(caught.value).rsplit(" ", 1)[1])
        kernel = cx.ntk_file(model, x, path, *others, outputs=outputs, max_bytes=smallest)
        assert _notes(path)["finished"]
        assert len(_notes(path)["done"]) > 2
        assert isinstance(kernel, np.memmap)
        assert not kernel.flags.writeable
        assert brute_force.relative(torch.from_numpy(np.array(kernel)), whole) <= 1e-12
        assert others or np.array_equal(kernel, kernel.T)
        again = cx.ntk_file(model, x, path, *others, outputs=outputs)  # finished: read, not computed
        assert np.array_equal(again, kernel)
        assert (
            smallest < cx.ntk_plan(model, x, *others, outputs=outputs).smallest_bytes
        )  # the kernel is not held


def test_without_a_bound_and_from_a_loader(tmp_path: Path) -> None:
    model, x = make("convolutions", 1), _x(37)
    whole = cx.ntk(model, x, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, torch.zeros(37)), batch_size=5)
    for name, data, bound in (("a", x, None), ("b", loader, None), ("c", loader, 45_000), ("d", x[:3], None)):
        kernel = cx.ntk_file(model, data, str(tmp_path / f"{name}.npy"), max_bytes=bound)
        n = len(kernel)
        assert brute_force.relative(torch.from_numpy(np.array(kernel)), whole[:n, :n]) <= 1e-12
    assert len(_notes(tmp_path / "c.npy")["done"]) > 1


KILLED = """
import os, random, signal, sys
from pathlib import Path
import numpy as np
import torch
import catapult_ext as cx
from catapult_ext.stream import file as room

torch.set_num_threads(1)
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(seed)

def compute(path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 30), torch.nn.Tanh(), torch.nn.Linear(30, 2)).double()
    return cx.ntk_file(model, torch.randn(61, 32, dtype=torch.float64), path, max_bytes=90_000)

def dying(function, survives, half):
    # The call after so many dies, with half of its work done.
    def call(*args):
        nonlocal survives
        survives -= 1
        if survives < 0:
            if half:
                function(args[0], args[1][: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

kills = 0
path = folder / "killed.npy"
while kills < 40:
    pid = os.fork()
    if pid == 0:
        choice = draw.randrange(4) if kills else 0
        if choice == 0:
            room.write_json = dying(room.write_json, draw.randrange(1, 4), False)
        elif choice == 1:
            os.fsync = dying(os.fsync, draw.randrange(4), False)
        else:
            os.pwrite = dying(os.pwrite, draw.randrange(200), choice == 2)
        compute(path)
        os._exit(0)
    draw.random()
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
        break
    kills += 1
whole = compute(folder / "whole.npy")
assert (folder / "whole.npy").read_bytes() == path.read_bytes()
print(kills)
"""


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_killed_at_random_points_it_ends_in_the_same_bits(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, str(tmp_path), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3


def test_nothing_is_written_over(tmp_path: Path) -> None:
    model, x = make("convolutions", 1), _x(37)
    path = tmp_path / "k.npy"
    cx.ntk_file(model, x, path, max_bytes=60_000)
    before = path.read_bytes()
    other = make("convolutions", 2)
    changed = x.clone()
    changed[3, 4] += 1e-9
    for call, message in (
        (lambda: cx.ntk_file(other, x, path), r"kernel\.values"),
        (lambda: cx.ntk_file(model, changed, path), r"kernel\.x\.digest"),
        (lambda: cx.ntk_file(model, x, path, x), r"kernel\.z"),
        (lambda: cx.ntk_file(model, x, path, outputs="sum"), r"kernel\.outputs"),
        (lambda: cx.ntk_file(model, x, path, params=["1.weight"]), r"kernel\.params"),
        (lambda: cx.ntk_file(nn.Sequential(model).eval(), x, path), r"kernel\.values"),
    ):
        with pytest.raises(
            ValueError, match=f"path: .* holds another kernel .*{message}.* choose another path"
        ):
            call()
        assert path.read_bytes() == before
    stranger = tmp_path / "s.npy"
    np.save(stranger, np.zeros(3))
    with pytest.raises(ValueError, match=r"s.npy exists and is no kernel that was written here"):
        cx.ntk_file(model, x, stranger)
    assert np.array_equal(np.load(stranger), np.zeros(3))


def test_interrupted_it_goes_on_with_its_own_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("convolutions", 1), _x(61)
    path = tmp_path / "k.npy"
    calls = []

    def fails(file: int, *args: object) -> int:
        calls.append(args)
        if len(calls) > 40:
            raise OSError(28, "No space left on device")
        return write(file, *args)  # type: ignore[arg-type]

    import os

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(UnwritableFile, match="No space left on device"):
        cx.ntk_file(model, x, path, max_bytes=70_000)
    monkeypatch.setattr(os, "pwrite", write)
    done = _notes(path)["done"]
    assert done
    with pytest.raises(ValueError, match=r"max_bytes: stored 70000, current 80000"):
        cx.ntk_file(model, x, path, max_bytes=80_000)
    kernel = cx.ntk_file(model, x, path)
    assert len(_notes(path)["done"]) > len(done)
    assert brute_force.relative(torch.from_numpy(np.array(kernel)), cx.ntk(model, x)) <= 1e-12


@pytest.mark.parametrize("path", ["k.txt", "missing/k.npy"])
def test_paths_that_cannot_be(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match=r"path: expected a .npy file in a folder that exists"):
        cx.ntk_file(make("convolutions", 1), _x(7), tmp_path / path)

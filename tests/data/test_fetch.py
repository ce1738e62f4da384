"""Fetching whole sets, from a server that the test starts on the loopback address."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from image_files import write_fashion_mnist, write_svhn
from loopback import md5

import catapult_ext as cx
from catapult_ext.data import download as room
from catapult_ext.data import sets
from catapult_ext.data.image_set import Download


def published(monkeypatch, name: str, downloads: tuple[Download, ...]) -> None:
    monkeypatch.setitem(sets.SETS, name, replace(sets.SETS[name], downloads=downloads))


@pytest.fixture
def svhn(server, tmp_path, monkeypatch) -> Path:
    """Files that the server has under the sums that the set publishes; an empty data root."""
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    write_svhn(source)
    items = []
    for name in ("train_32x32.mat", "test_32x32.mat"):
        server.files[f"/svhn/{name}"] = (source / name).read_bytes()
        items.append(Download(f"{server.url}/svhn/{name}", md5((source / name).read_bytes()), "svhn"))
    published(monkeypatch, "svhn", tuple(items))
    return root


def test_a_fetched_set_loads(svhn, server):
    paths = cx.data.fetch("svhn", svhn)
    assert paths == [svhn / "svhn" / "train_32x32.mat", svhn / "svhn" / "test_32x32.mat"]
    assert len(cx.data.load("svhn", train=4, test=2, root=svhn).train) == 4
    assert sorted(p.name for p in (svhn / "svhn").iterdir()) == ["test_32x32.mat", "train_32x32.mat"]


def test_a_set_goes_on_where_it_stopped(svhn, server):
    whole = server.files.pop("/svhn/test_32x32.mat")
    with pytest.raises(ConnectionError, match="404"):
        cx.data.fetch("svhn", svhn)
    server.files["/svhn/test_32x32.mat"] = whole
    cx.data.fetch("svhn", svhn)
    assert [path for path, _ in server.asked] == [f"/svhn/{n}_32x32.mat" for n in ("train", "test", "test")]


def test_another_copy_is_not_fetched_beside_what_is_there(svhn, server):
    (svhn / "mine").mkdir(parents=True)
    write_svhn(svhn / "mine", rows=(30, 10))
    with pytest.raises(
        FileExistsError, match=r"svhn: .*root has it already \(partial: mine/train_32x32\.mat"
    ):
        cx.data.fetch("svhn", svhn)
    (svhn / "mine" / "test_32x32.mat").write_bytes(b"damaged")
    with pytest.raises(
        FileExistsError, match=r"svhn: move away what is there first: .*test_32x32\.mat is no file"
    ):
        cx.data.fetch("svhn", svhn)
    assert server.asked == []


def test_the_official_files_are_not_fetched_twice(server, tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)
    from catapult_ext.data import fashion_mnist

    sums = [(n, md5((tmp_path / "fashion-mnist" / n).read_bytes())) for n in fashion_mnist._NAMES]
    monkeypatch.setattr(fashion_mnist, "_FILES", sums)
    assert cx.data.fetch("fashion-mnist", tmp_path) == []
    assert server.asked == []


def archive_of(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return file.getvalue()


@pytest.fixture
def cifar10(server, tmp_path, monkeypatch, write_cifar):
    """`cifar10(change)` serves an archive of six batches, of which `change` may change the members."""
    source = write_cifar() / "cifar-10-batches-py"
    (source / "batches.meta").write_bytes(b"names")
    members = {f"cifar-10-batches-py/{path.name}": path.read_bytes() for path in source.iterdir()}

    def serve(more=None, links=None, without=()) -> Path:
        named = {**members, **(more or {})}
        content = archive_of({n: c for n, c in named.items() if n not in without}, links)
        server.files["/cifar-10-python.tar.gz"] = content
        item = Download(f"{server.url}/cifar-10-python.tar.gz", md5(content), "cifar10", tuple(members))
        published(monkeypatch, "cifar10", (item,))
        return tmp_path / "fetched"

    return serve


def test_an_archive_is_unpacked_and_removed(cifar10):
    root = cifar10(more={"cifar-10-batches-py/readme.html": b"left out"})
    assert cx.data.fetch("cifar10", root) == [root / "cifar10" / "cifar-10-batches-py"]
    assert len(cx.data.load("cifar10", train=4, root=root).train) == 4
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    batches = ["batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    assert names == [f"cifar10/cifar-10-batches-py/{name}" for name in batches]


def test_only_known_members_leave_an_archive(cifar10, tmp_path):
    before = {path for path in tmp_path.rglob("*")}
    root = cifar10(
        more={"../escaped": b"x", "/tmp/escaped-absolute": b"x", "cifar-10-batches-py/../../escaped": b"x"},
        links={"cifar-10-batches-py/link": "/etc/passwd"},
    )
    cx.data.fetch("cifar10", root)
    outside = {p for p in tmp_path.rglob("*")} - before
    assert all(path == root or root in path.parents for path in outside)
    assert not any("escaped" in path.name or path.is_symlink() for path in outside)
    assert not Path("/tmp/escaped-absolute").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"without": ["cifar-10-batches-py/test_batch"]}, r"has no cifar-10-batches-py/test_batch"),
        (
            {
                "without": ["cifar-10-batches-py/test_batch"],
                "links": {"cifar-10-batches-py/test_batch": "/etc/passwd"},
            },
            r"test_batch in it is not a file of at most",
        ),
    ],
)
def test_an_archive_that_is_not_what_it_should_be_unpacks_nothing(cifar10, options, reason):
    root = cifar10(**options)
    with pytest.raises(ValueError, match=reason):
        cx.data.fetch("cifar10", root)
    assert [path.name for path in (root / "cifar10").iterdir()] == ["cifar-10-python.tar.gz"]


def test_a_member_that_unpacks_to_too_much_is_refused(cifar10, monkeypatch):
    monkeypatch.setattr(room, "_MEMBER_BYTES", 10_000)
    with pytest.raises(ValueError, match="in it is not a file of at most 10000 bytes"):
        cx.data.fetch("cifar10", cifar10())


def test_an_incomplete_folder_is_not_unpacked_over(cifar10, server):
    root = cifar10()
    (root / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(
        FileExistsError, match="cifar-10-batches-py is there but is not complete: move it away"
    ):
        cx.data.fetch("cifar10", root)
    assert server.asked == []


def test_two_fetches_do_not_meet(svhn, server):
    from filelock import FileLock

    (svhn / "svhn").mkdir(parents=True)
    with (
        FileLock(svhn / "svhn" / ".fetch.lock"),
        pytest.raises(FileExistsError, match="something else is fetching"),
    ):
        cx.data.fetch("svhn", svhn)
    assert server.asked == []


def test_sets_that_cannot_be_fetched_say_why(tmp_path, monkeypatch):
    monkeypatch.delenv("CATAPULT_DATA", raising=False)
    for name, reason in (
        ("celeba", "celeba cannot be fetched: its owners give it only to those who accept their terms"),
        ("cifar10-jpeg", "cifar10-jpeg cannot be fetched: it is derived from CIFAR-10"),
        ("digits", "digits cannot be fetched: nothing is missing"),
        ("mnist", "name must be one of cifar10, .*got 'mnist'"),
        ("svhn", "no data root to put the files in: set CATAPULT_DATA, or give root"),
    ):
        with pytest.raises(ValueError, match=reason):
            cx.data.fetch(name)
    for found in cx.data.available(tmp_path):
        assert found.fetchable == bool(sets.SETS[found.name].downloads)


def test_every_published_file_is_stated_with_a_sum():
    stated = [item for image_set in sets.SETS.values() for item in image_set.downloads]
    assert len(stated) == 9
    for item in stated:
        assert item.url.startswith(("http://", "https://"))
        assert len(item.md5) == 32
        assert set(item.md5) <= set("0123456789abcdef")


def test_the_command_fetches_lists_and_fails_in_one_line(svhn, server, capsys):
    from typer.testing import CliRunner

    from python_experiments.cli import app

    def call(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    result = call("data", "fetch", "svhn", "--data-root", svhn)
    assert result.exit_code == 0, result.output
    assert "svhn: the official files are there" in result.output
    listed = " ".join(call("data", "--data-root", svhn).output.replace("│", " ").split())
    assert "svhn/train_32x32.mat (40 rows)" in listed
    assert "or: catapult data fetch usps" in listed
    result = call("data", "--data-root", svhn, "fetch", "celeba")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: celeba cannot be fetched: its owners")
    assert result.stderr.count("\n") == 1

"""Fetching one file, from a server that the test starts on the loopback address."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback import Server, md5

from catapult_ext.data import download as room
from catapult_ext.data.download import download

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes


def get(server: Server, folder: Path, **options) -> Path:
    server.files.setdefault("/f.bin", CONTENT)
    options = {"pause": 0.0, **options}
    return download(server.url + "/f.bin", folder / "f.bin", md5(CONTENT), **options)


def test_a_file_arrives_with_progress(server, tmp_path):
    reports = []
    path = get(server, tmp_path, report=lambda *said: reports.append(said))
    assert path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]
    assert {(name, total) for name, _, total in reports} == {("f.bin", len(CONTENT))}
    counts = [here for _, here, _ in reports]
    assert counts == sorted(counts)
    assert len(counts) > 3
    assert counts[-1] == len(CONTENT)
    get(server, tmp_path)
    assert len(server.asked) == 1  # what is there is not fetched again


@pytest.mark.parametrize("breaks", [[200_000], [1, 70_000, 0, 5]])
def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path, breaks):
    server.breaks = list(breaks)
    assert get(server, tmp_path).read_bytes() == CONTENT
    starts = [0]
    for sent in breaks:
        starts.append(starts[-1] + sent)
    assert [asked for _, asked in server.asked] == [f"bytes={start}-" if start else None for start in starts]


def test_giving_up_keeps_what_has_come_for_the_next_fetch(server, tmp_path):
    server.breaks = [100_000, 50_000]
    with pytest.raises(
        ConnectionError,
        match=r"f\.bin: the connection broke off .*\(2 attempts\); the 150000 bytes that have come",
    ) as error:
        get(server, tmp_path, attempts=2)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin.part"]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1][1] == "bytes=150000-"
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]


def test_a_stop_in_the_middle_keeps_what_has_come(server, tmp_path):
    def stop(_name: str, here: int, _total: int | None) -> None:
        if here > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path, report=stop)
    kept = (tmp_path / "f.bin.part").read_bytes()
    assert len(kept) > 300_000
    assert kept == CONTENT[: len(kept)]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1][1] == f"bytes={len(kept)}-"


def test_a_server_that_does_not_resume_starts_anew(server, tmp_path):
    server.breaks, server.resumes = [200_000], False
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=200000-"]


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"x" * 1000], ids=["whole", "longer", "other"])
def test_a_part_is_judged_by_the_server_and_the_sum(server, tmp_path, part):
    (tmp_path / "f.bin.part").write_bytes(part)
    if part == b"x" * 1000:  # nobody can see that before the end
        with pytest.raises(ValueError, match="what came is not the published file and was thrown away"):
            get(server, tmp_path)
        assert list(tmp_path.iterdir()) == []
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_range_that_was_not_asked_for_is_not_appended(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(CONTENT[:1000])
    server.lie = "bytes 2000-511999/512000"
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == ["bytes=1000-", None]


def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path):
    server.files["/f.bin"] = CONTENT[:-1] + b"x"
    with pytest.raises(
        ValueError,
        match=r"f\.bin: what came is not the published file and was thrown away: .*" + md5(CONTENT),
    ) as error:
        get(server, tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(server, tmp_path):
    (tmp_path / "f.bin").write_bytes(b"mine")
    with pytest.raises(
        FileExistsError, match=r"f\.bin is there but is not the official file: move it away first"
    ):
        get(server, tmp_path)
    assert (tmp_path / "f.bin").read_bytes() == b"mine"
    assert server.asked == []


def test_a_missing_file_is_one_line_and_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"^http://.*/g\.bin: the server answers 404 Not Found$"):
        download(server.url + "/g.bin", tmp_path / "g.bin", md5(b""), pause=0.0)
    assert len(server.asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.refuses = [503, 429]
    assert get(server, tmp_path).read_bytes() == CONTENT
    server.refuses = [500] * 9
    with pytest.raises(ConnectionError, match=r"the server answers 500 .*\(3 attempts\)$"):
        download(server.url + "/f.bin", tmp_path / "g.bin", md5(CONTENT), pause=0.0, attempts=3)


def test_no_server_is_one_line(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"^http://127\.0\.0\.1:1/f: no connection .*\(2 attempts\)$"):
        download("http://127.0.0.1:1/f", tmp_path / "f", md5(b""), pause=0.0, attempts=2)


def test_a_full_disk_is_told_before_it_is_full(server, tmp_path, monkeypatch):
    usage = type(room.shutil.disk_usage(tmp_path))(10**6, 10**6 - 5, 5)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"512000 bytes are to come and 5 are free on this disk"):
        get(server, tmp_path)

"""Fetches official files: pooch compares the checksum and puts a file in its place, resuming is done here."""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from catapult_ext.data.image_set import Download
from catapult_ext.data.sets import named, read

__all__ = ["download", "fetch"]

Report = Callable[[str, int, "int | None"], None]

_TIMEOUT = (15, 60)  # seconds to connect, and without a byte
_ATTEMPTS = 5
_MEMBER_BYTES = 64 << 20


def fetch(
    name: str, root: str | os.PathLike[str] | None = None, *, report: Report | None = None
) -> list[Path]:
    """Fetch the official files of an image set into a folder of its name under the data root.

    What has arrived when a connection breaks, or the program ends, is kept in NAME.part and not fetched again.
    A file is put in its place only when its checksum is the published one, and nothing is ever overwritten.

    Args:
        name: "cifar10", "svhn", "fashion-mnist" or "usps" (LIBSVM's files).
        root: the data root, made where it is missing; default is the environment variable CATAPULT_DATA.
        report: called with the name of the file, the bytes here and the bytes in all (None: unknown) as they
            come in.

    Returns:
        The files, as they lie there now; empty where the official files were there already.

    Raises:
        ValueError: for a set that cannot be fetched, a file whose checksum is not the published one, or what
            is no such archive.
        FileExistsError: where something else is in the place of a file.
        ConnectionError: where the server cannot be reached, does not have the file or breaks off too often.
        OSError: where the disk is full or cannot be written.
    """
    image_set = named(name)
    if not image_set.downloads:
        raise ValueError(f"{name} cannot be fetched: {image_set.by_hand}")
    folder = root if root is not None else os.environ.get("CATAPULT_DATA") or None
    if folder is None:
        raise ValueError("no data root to put the files in: set CATAPULT_DATA, or give root (--data-root)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        reading = read(image_set, folder)
    except FileNotFoundError:
        pass  # of what is there, each file is looked at below
    except ValueError as error:
        raise FileExistsError(f"{name}: move away what is there first: {error}") from error
    else:
        if reading.form == "official":
            return []
        raise FileExistsError(
            f"{name}: {folder} has it already ({reading.form}: {', '.join(f['path'] for f in reading.files)}), and "
            "a second copy would leave open which one is meant: move it away or choose another data root"
        )
    fetched = []
    for item in image_set.downloads:
        fetched += _fetch_one(item, folder / item.folder, report)
    read(image_set, folder)  # what was fetched can be loaded
    return fetched


def _fetch_one(item: Download, folder: Path, report: Report | None) -> list[Path]:
    from filelock import FileLock, Timeout

    path = folder / item.url.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".fetch.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"{folder}: something else is fetching into this folder just now") from None
    try:
        if item.unpack is None:
            return [download(item.url, path, item.md5, report=report)]
        tops = sorted({folder / member.partition("/")[0] for member in item.unpack})
        for top in tops:
            if top.exists():
                raise FileExistsError(f"{top} is there but is not complete: move it away first")
        download(item.url, path, item.md5, report=report)
        _unpack(path, folder, item.unpack)
        path.unlink()
        return tops
    finally:
        lock.release()
        (folder / ".fetch.lock").unlink(missing_ok=True)


def download(
    url: str,
    path: Path,
    md5: str,
    *,
    report: Report | None = None,
    attempts: int = _ATTEMPTS,
    pause: float = 1.0,
) -> Path:
    """Fetch one file, going on from what an earlier attempt left beside it in a file with the ending .part.

    Args:
        url: http or https.
        path: where it goes; its folder is there.
        md5: the published MD5 sum.
        report: as in `fetch`.
        attempts: how often to connect before giving up.
        pause: seconds before the second attempt, doubled before each further one.

    Returns:
        `path`. Where it was there already with this sum, nothing is fetched.

    Raises:
        As `fetch`.
    """
    import pooch

    if path.exists() and not pooch.file_hash(str(path), alg="md5") == md5:
        raise FileExistsError(f"{path} is there but is not the official file: move it away first")
    pooch.get_logger().setLevel("WARNING")
    part = path.with_name(path.name + ".part")

    def downloader(url: str, output: str, _pooch: object) -> None:
        _resume(url, part, path.name, report, attempts, pause)
        os.replace(part, output)

    try:
        pooch.retrieve(url, f"md5:{md5}", fname=path.name, path=path.parent, downloader=downloader)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{url}: what came is not the published file and was thrown away: {reason}"
        ) from error
    return path


class _Broken(Exception):
    """An attempt that another one may complete."""


def _resume(url: str, part: Path, name: str, report: Report | None, attempts: int, pause: float) -> None:
    for attempt in range(1, attempts + 1):
        try:
            _attempt(url, part, name, report)
        except _Broken as error:
            if attempt == attempts:
                here = _size(part)
                kept = (
                    f"; the {here} bytes that have come are kept, and the next fetch goes on there"
                    if here
                    else ""
                )
                raise ConnectionError(f"{url}: {error} ({attempts} attempts){kept}") from error
            time.sleep(pause * 2 ** (attempt - 1))
        else:
            return


def _attempt(url: str, part: Path, name: str, report: Report | None) -> None:
    """Append what is missing to the part.

    Raises:
        _Broken: where it is worth trying again.
        ConnectionError: where it is not.
    """
    import requests
    from urllib3.exceptions import HTTPError

    here = _size(part)
    headers = {"Accept-Encoding": "identity"}  # the bytes of the file, not packed once more
    if here:
        headers["Range"] = f"bytes={here}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            status, span = response.status_code, response.headers.get("Content-Range", "")
            if here and status == 416 and span == f"bytes */{here}":
                return  # all of it is here
            if here and (status == 416 or (status == 206 and not span.startswith(f"bytes {here}-"))):
                part.unlink()
                raise _Broken("the server has another file than the one begun")
            if status >= 500 or status == 429:
                raise _Broken(f"the server answers {status} {response.reason}")
            if status not in (200, 206):
                raise ConnectionError(f"{url}: the server answers {status} {response.reason}")
            if status == 200:
                here = 0  # it does not resume
            length = response.headers.get("Content-Length", "")
            total = here + int(length) if length.isdigit() else None
            _check_space(part, total and total - here)
            with part.open("ab" if here else "wb") as file:
                for piece in response.raw.stream(1 << 16, decode_content=False):
                    file.write(piece)
                    here += len(piece)
                    if report is not None:
                        report(name, here, total)
            if total is not None and here != total:
                raise _Broken(f"the connection broke off after {here} of {total} bytes")
    except (requests.ConnectionError, requests.Timeout) as error:
        raise _Broken(f"no connection ({type(error).__name__})") from error
    except requests.RequestException as error:
        raise ConnectionError(f"{url}: {' '.join(str(error).split())}") from error
    except HTTPError as error:
        raise _Broken(
            f"the connection broke off after {_size(part)} bytes ({type(error).__name__})"
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(part: Path, more: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if more is not None and more > free:
        raise OSError(f"{part.parent}: {more} bytes are to come and {free} are free on this disk")


def _unpack(archive: Path, folder: Path, members: tuple[str, ...]) -> None:
    """Take these members, plain files of known names, out of a tar archive; whatever else is in it stays there.

    Raises:
        ValueError: where one is missing, no plain file or far too large.
    """
    workplace = folder / ".unpacking"
    shutil.rmtree(workplace, ignore_errors=True)  # of an earlier attempt
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name not in members:
                    continue
                source = tar.extractfile(member) if member.isreg() else None
                if source is None or member.size > _MEMBER_BYTES:
                    raise ValueError(
                        f"{archive}: {member.name} in it is not a file of at most {_MEMBER_BYTES} bytes"
                    )
                target = workplace / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file)
        missing = [member for member in members if not (workplace / member).exists()]
        if missing:
            raise ValueError(f"{archive} has no {', '.join(missing)}")
        for top in sorted({member.partition("/")[0] for member in members}):
            os.replace(workplace / top, folder / top)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{archive} is no tar archive: {error}") from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)

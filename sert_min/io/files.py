"""Files that survive a kill: durable JSONL, atomic files and folders, one writer per folder.

Writes are all-or-nothing: a reader finds the old content or the new, never a part. If the machine
dies while a line is appended, the torn line is set aside in `NAME.torn` before the next one is
written, so the two are never glued together.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock

from sert_min.io.errors import SertError, need

# What file systems answer that know no fsync of folders, no locks, or no modes.
UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM,
          errno.EACCES, errno.EBADF, errno.EISDIR)  # fmt: skip

# --- reading --------------------------------------------------------------------------------------


def parse_json(data: bytes, where: str, fix: str) -> dict:
    """The JSON object in `data`; NaN and Infinity, which Python's reader takes, are refused."""

    def refuse(name: str):
        raise ValueError(f"{name} is no number")

    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)  # some editors' BOM
    except (ValueError, RecursionError) as e:
        fix = f"save it as UTF-8, or {fix}" if isinstance(e, UnicodeDecodeError) else fix
        raise SertError(f"{where} is not JSON ({str(e)[:80]}); {fix}") from None
    need(isinstance(value, dict), f"{where} is not a JSON object; {fix}")
    return value


def there(path: Path | str) -> Path:
    """`path`, if it is a file."""
    path = Path(path)
    need(path.exists(), f"{path} does not exist; check the path")
    need(not path.is_dir(), f"{path} is a folder, not a file; check the path")
    return path


def read_lines(path: Path | str, fix: str) -> Iterator[tuple[int, dict]]:
    """(number, record) of each line of a JSONL file; one that is no JSON object is an error."""
    with open(there(path), "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, parse_json(line, f"{path} line {number}", fix)


def read_jsonl(path: Path | str, form: dict | None = None) -> Iterator[dict]:
    """Yield the records one by one. One that lacks a key of `form`, {key: type or types}, is an error."""
    for number, record in read_lines(path, "remove that line or make the file again"):
        for key, kind in (form or {}).items():
            wrong = f"{key} is missing or of a wrong kind; make the file again"
            need(isinstance(record.get(key), kind), f"{path} line {number}: {wrong}")
        yield record


def read_json(path: Path | str) -> dict:
    """The JSON object in `path`."""
    return parse_json(there(path).read_bytes(), str(path), "make the file again")


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- writing --------------------------------------------------------------------------------------


def to_line(record: dict) -> str:
    """One JSON object per line, keys in the record's own order, ASCII only."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"


def sync(path: Path | int) -> None:
    """Wait until a file (or its descriptor) is on the disk, or the renames and new names in a folder.
    Some network and FUSE file systems can't promise that: they get one warning."""
    try:
        fd = path if isinstance(path, int) else os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            if fd != path:
                os.close(fd)
    except OSError as e:
        if e.errno not in UNABLE:
            raise
        warn_once("can't promise that what is written survives a power cut")


@functools.cache
def warn_once(what: str) -> None:
    print(f"note: this file system {what}", file=sys.stderr)


def beside(path: Path, ending: str) -> Path:
    """A hidden name in the folder of `path`; a file system takes names of at most 255 bytes."""
    name = os.fsencode(path.name)
    short = path.name if len(name) <= 240 else hashlib.sha256(name).hexdigest()
    return path.with_name(f".{short}.{ending}")


def check_place(path: Path | str, folder: bool) -> None:
    """Refuse, before the work begins, a place that its result can't take: a read-only disk behind a
    link, a name that is too long, a mount, a folder where a file (or else a `folder`) is to be."""
    path = Path(os.path.realpath(path))
    kind = "folder" if folder else "plain file"  # /dev/null is none
    fits = not path.exists() or (path.is_dir() if folder else path.is_file())
    need(fits, f"{path} is no {kind}; move it away or choose another name")
    need(not os.path.ismount(path), f"{path} is a mount, which can't be replaced; link into it")
    part = beside(path, f"{os.getpid()}.tmp")
    part.mkdir(parents=folder)
    part.rmdir()


def write_atomic(path: Path | str, content: bytes | str | Iterable[str]) -> None:
    """Replace `path` by the content, all or nothing, durably. The folder's lock keeps other writers
    away; what a killed writer left under the temporary name is overwritten by the next."""
    path = Path(os.path.realpath(path))  # a link stays one
    part = beside(path, "tmp")
    try:
        with open(part, "wb") as f:
            chunks = [content] if isinstance(content, bytes | str) else content
            f.writelines(c if isinstance(c, bytes) else c.encode() for c in chunks)
            f.flush()
            sync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def append_durable(path: Path | str, text: str) -> None:
    """Append whole lines, durably, or (on a full disk, say) leave the file as it was."""
    set_torn_tail_aside(path)
    with open(path, "ab", buffering=0) as f:
        before = f.tell()
        try:
            data = memoryview(text.encode())
            while data:
                data = data[os.write(f.fileno(), data) :]
            sync(f.fileno())
        except OSError as e:
            f.truncate(before)
            raise OSError(e.errno, e.strerror, str(path)) from None
    if before == 0:
        sync(Path(path).parent)


def set_torn_tail_aside(path: Path | str) -> int:
    """Move the bytes after the last newline of `path` into `path.torn`; returns how many."""
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "r+b") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        if f.read() in (b"", b"\n"):
            return 0
        f.seek(0)
        whole = f.read()
        end = whole.rfind(b"\n") + 1
        torn = path.with_name(path.name + ".torn")
        with open(torn, "ab") as aside:
            aside.write(whole[end:] + b"\n")
        sync(torn)
        f.truncate(end)
        sync(f.fileno())
    return len(whole) - end


# --- folders --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its name, durably, if the block succeeds.
    A folder that is there already is replaced whole; if `path` is a link, where it leads."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    part, old = beside(path, "tmp"), beside(path, "old")
    part.mkdir()
    try:
        yield part
        for name in (*part.iterdir(), part):
            sync(name)
        if path.exists():
            os.rename(path, old)
        os.rename(part, path)
        sync(path.parent)
    finally:
        recover_folder(path)


def recover_folder(path: Path) -> None:
    """Clear up what an `atomic_folder` that failed or was killed left beside `path`. If it got no
    further than between its two renames, the old folder is put back."""
    path = Path(os.path.realpath(path))
    part, old = beside(path, "tmp"), beside(path, "old")
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder: Path | str, name: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process; a second process is refused, or waits. The
    lock dies with its holder. Where the file system knows no locks, a file with the holder's host and
    process number serves."""
    taken = f"another process is writing to {folder}; wait for it or choose another folder"
    folder = Path(os.path.realpath(folder))  # what a link leads to may not be there yet
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / f"{name}-holder"
    with open(folder / name, "w") as f, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise SertError(taken) from None
        except OSError as e:
            if e.errno not in UNABLE:
                raise
            try:
                stack.enter_context(filelock.SoftFileLock(holder, timeout=-1 if wait else 0))
            except filelock.Timeout:
                raise SertError(f"{taken} (if that process is gone, delete {holder})") from None
        yield


def clean_name(text: str) -> str:
    """`text` as a part of a path: at most 80 letters, digits and `_.-`, of at most 240 bytes."""
    return re.sub(r"[^\w.-]", "-", text)[:80].encode()[:240].decode("utf-8", "ignore")


def folders_in(folder: Path) -> list[Path]:
    """A folder and all folders in it, linked ones as well: each once, by its own name if it is there."""
    found: dict[str, str] = {}
    for links in (False, True):
        for at, folders, _ in os.walk(folder, followlinks=links):
            if found.setdefault(os.path.realpath(at), at) != at:
                folders.clear()  # known by another name, or a loop
    return sorted(map(Path, found.values()))


def stored_settings(path: Path) -> dict:
    """The settings that an earlier run wrote down at `path`; {} if there was none."""
    return read_json(path) if path.exists() else {}


def check_settings(path: Path, settings: dict, fix: str) -> None:
    """Store `settings` (JSON) at `path`, or compare with what is stored there: a difference is an
    error that shows both values, so work under other settings is never mixed into a folder."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        return write_atomic(path, json.dumps(settings, indent=1) + "\n")
    there = read_json(path)
    differ = [k for k in sorted(settings) if there.get(k) != settings[k]]
    shown = "; ".join(f"{k}: {there.get(k)} there, {settings[k]} now" for k in differ)
    return need(not differ, f"{path.parent} holds a run with other settings ({shown}); {fix}")

"""Files that survive a kill: durable JSONL, atomic files and folders, one writer per folder.

A line or a file is either wholly there or not there. A torn last line (the machine died while it
was written) is set aside in `NAME.torn`, never glued to the next record.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from sert_min.io.errors import SertError, need


def to_line(record: dict) -> str:
    """One JSON object per line, keys in the record's own order, ASCII only."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"


MAX_LINE = 2**24  # bytes; the longest that anything here writes is a reply of 1,000,000 characters
PATH = {  # the form of a line of paths.jsonl
    "task": str,
    "id": str,
    "question": str,
    "answer": str,
    "branch": int,
    "sample": int,
    "text": str,
    "token_ids": [int],
    "logprobs": [float],
    "path_start": int,
    "path_end": int,
    "finish": str,
    "perplexity": (float, None),
    "rep2": float,
    "verdict": str,
}


def fits(value, form) -> bool:
    """Has a JSON value this form? A type (float: any finite number), None, a range of whole
    numbers, a tuple of alternatives (with `...`: or missing), [form of the elements] or {key:
    form}, other keys allowed.

    >>> fits({"a": [1, 2], "b": None}, {"a": [int], "b": (str, None), "c": (int, ...)})
    True
    """
    if isinstance(form, dict):
        return isinstance(value, dict) and not wrong_keys(value, form)
    if isinstance(form, list):
        if form == [int]:  # quick: paths are long
            return isinstance(value, list) and set(map(type, value)) <= {int}
        return isinstance(value, list) and all(fits(v, form[0]) for v in value)
    if isinstance(form, tuple):
        return any(fits(value, f) for f in form)
    if isinstance(form, range):
        return type(value) is int and value in form
    if form is float:
        return type(value) in (int, float) and abs(value) < 1e300  # not NaN
    return value is None if form is None else type(value) is form


def wrong_keys(record: dict, form: dict) -> list[str]:
    """The keys of `form` that a record lacks, or has with another kind of value."""
    return [k for k, f in form.items()
            if not (fits(record[k], f) if k in record else isinstance(f, tuple) and ... in f)]  # fmt: skip


def no_constant(name: str):
    """JSON has no NaN and no Infinity, Python's reader has."""
    raise ValueError(f"{name} is no number")


def read_jsonl(path: Path | str, form: dict | None = None) -> Iterator[dict]:
    """Yield the records of a JSONL file; a line that is no JSON object, or not of this `form`, is
    an error with its number. Reads line by line, so that memory stays flat."""
    way_out = "remove that line or make the file again"
    try:
        with open(path, "rb") as f:
            number = 0
            while line := f.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise SertError(f"{path} line {number} is longer than 16 MB; {way_out}")
                try:
                    record = json.loads(line.decode("utf-8"), parse_constant=no_constant)
                except (ValueError, RecursionError) as e:
                    raise SertError(
                        f"{path} line {number} is not JSON ({str(e)[:80]}); {way_out}"
                    ) from None
                if not isinstance(record, dict):
                    raise SertError(f"{path} line {number} is not a JSON object; remove that line")
                if wrong := wrong_keys(record, form or {}):
                    raise SertError(
                        f"{path} line {number}: {wrong[0]} is missing or of a wrong kind; {way_out}"
                    )
                yield record
    except FileNotFoundError:
        raise SertError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise SertError(f"{path} is a folder, not a file; check the path") from None


def read_json(path: Path | str) -> dict:
    """The JSON object in `path`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=no_constant)
    except FileNotFoundError:
        raise SertError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise SertError(f"{path} is a folder, not a file; check the path") from None
    except (ValueError, RecursionError):
        raise SertError(f"{path} is not valid JSON; make the file again") from None
    if not isinstance(value, dict):
        raise SertError(f"{path} is not a JSON object; make the file again")
    return value


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path | str, chunks: str | Iterable[str]) -> None:
    """Replace `path` by the text; a reader sees the old content or the new, nothing between."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "w", encoding="utf-8") as f:
            f.writelines([chunks] if isinstance(chunks, str) else chunks)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def append_durable(path: Path | str, text: str) -> None:
    """Append whole lines and wait until they are on the disk. On failure (a full disk, say) the
    file is cut back to what it held before. A torn last line is set aside first."""
    set_torn_tail_aside(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(fd).st_size
        try:
            data = memoryview(text.encode())
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        except OSError as e:
            os.ftruncate(fd, before)
            raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        os.close(fd)
    if before == 0:
        sync_folder(Path(path).parent)


def set_torn_tail_aside(path: Path | str) -> int:
    """Cut bytes after the last newline off `path` into `path.torn`; returns how many."""
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "r+b") as f:
        size = end = f.seek(0, os.SEEK_END)
        while end > 0:  # the last newline, looking backwards in chunks
            start = max(0, end - 65536)
            f.seek(start)
            newline = f.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end == size:
            return 0
        f.seek(end)
        with open(path.with_name(path.name + ".torn"), "ab") as torn:
            torn.write(f.read() + b"\n")
            torn.flush()
            os.fsync(torn.fileno())
        f.truncate(end)
        os.fsync(f.fileno())
    return size - end


def remove_leftovers(folder: Path) -> None:
    """Remove the `.NAME.PID.tmp` that killed writers left in `folder` and the folders in it. A file
    whose process lives stays: another script may be at work beside this one."""
    for part in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        found = re.fullmatch(r"\..+\.(\d{1,9})\.tmp", part.name)
        if found and part.is_file() and not is_running(int(found[1])):
            part.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Does another process of this machine have this number?"""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its name, durably, if the block succeeds.
    A folder already there is replaced whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Fixed names: what a killed process left is found here, and one that died between the two
    # renames below has its old folder put back.
    part, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for file in part.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        sync_folder(part)
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(part, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder: Path | str, name: str = ".lock", shared: bool = False) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process; a second one is refused. What killed writes
    left there is removed, unless other machines may be writing as well (`shared`)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SertError(
                f"another process is writing to {folder}; wait for it or choose another --out-dir"
            ) from None
        if not shared:
            remove_leftovers(folder)
        yield


def clean_name(text: str) -> str:
    """`text` as a part of a path: at most 80 letters, digits and `_.-`."""
    return re.sub(r"[^\w.-]", "-", text)[:80]


def block_path(folder: Path, i: int, n: int) -> Path:
    """The file of block i, which holds n questions; a block of another size is another file."""
    return folder / f"{i:06d}-{n}.jsonl"


def read_block(path: Path, wanted: list[tuple[str, str]]) -> list[dict] | None:
    """The records of a block file, if they belong to the `wanted` (id, question text) pairs in this
    order; None if the file is missing, damaged, or holds other questions."""
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        found = [(r["id"], r["question"]) for r in records]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return records if found == wanted else None


def stored_settings(path: Path) -> dict:
    """The settings that an earlier run wrote down at `path`; {} if there was none."""
    return read_json(path) if path.exists() else {}


def check_settings(path: Path, settings: dict, fix: str, defaults: dict | None = None) -> None:
    """Store `settings` (JSON) at `path`, or compare with what is stored there: a difference is an
    error that shows both values, so work under other settings is never mixed into a folder. A
    setting that an older folder lacks counts as its default."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_atomic(path, json.dumps(settings, indent=1) + "\n")
        return
    there = {**(defaults or {}), **read_json(path)}
    differ = [k for k in sorted(settings) if there.get(k) != settings[k]]
    shown = "; ".join(f"{k}: {there.get(k)} there, {settings[k]} now" for k in differ)
    need(not differ, f"{path.parent} holds a run with other settings ({shown}); {fix}")


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

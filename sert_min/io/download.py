"""Downloads of data files, checked against their SHA-256 and cached."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from sert_min.io.errors import SertError, need
from sert_min.io.files import lock_folder, sha256_file, write_atomic

DATA_URL = (  # of the authors of zero-shot CoT; SERT_DATA_URL names another place
    "https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/"
    "5ef330fcdeec0cd26aee27943504f91f8ec1c33c/dataset"
)
TIMEOUT = 30  # seconds without an answer
MAX_BYTES = 50_000_000


class DataFile(NamedTuple):
    local: str  # under --data-dir and in the cache
    remote: str  # under DATA_URL
    sha256: str


def cache() -> Path:
    """The folder of downloaded files (SERT_CACHE)."""
    return Path(os.environ.get("SERT_CACHE") or home() / ".cache" / "sert_min")


def home() -> Path:
    """The user's home folder; some containers give a user none."""
    try:
        return Path.home()
    except RuntimeError:
        told = "this user has no home folder; set HOME, or HF_HOME and SERT_CACHE, to a folder for downloads"
        raise SertError(told) from None


def data_file(file: DataFile, data_dir: Path | None = None) -> Path:
    """Path of a checked data file: in `data_dir`, or in the cache, downloaded if need be."""
    path = (data_dir or cache()) / file.local
    found = sha256_file(path) if path.is_file() else "none"
    if data_dir:
        need(found == file.sha256, f"{path} is missing or another file (SHA-256 {found}, expected "
             f"{file.sha256}); check --data-dir, or leave it out to download the right one")  # fmt: skip
    elif found != file.sha256:
        url = f"{os.environ.get('SERT_DATA_URL') or DATA_URL}/{file.remote}"
        data = download(url)
        found = hashlib.sha256(data).hexdigest()
        need(found == file.sha256, f"{url} gave {len(data):,} bytes with SHA-256 {found}, expected "
             f"{file.sha256}; repeat (a cut download, or a login page?), or get the files elsewhere "
             "and give --data-dir")  # fmt: skip
        save(path, data)
    return path


def download(url: str) -> bytes:
    """The body of `url`; every failure is one line that names a way out."""
    way_out = "check the network and repeat, or get the files elsewhere and give --data-dir"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return response.read(MAX_BYTES)
    except urllib.error.HTTPError as e:
        raise SertError(f"{url} answered {e.code} {e.reason}; {way_out}") from None
    except (OSError, http.client.HTTPException, ValueError) as e:  # URLError is an OSError
        reason = getattr(e, "reason", None) or e
        raise SertError(f"could not download {url} ({reason}); {way_out}") from None


def save(path: Path, data: bytes) -> None:
    """Write what was downloaded; several runs may do so at once."""
    try:
        with lock_folder(path.parent, ".lock-download", wait=True):
            write_atomic(path, data)
    except OSError as e:
        fix = "free space or name a folder with SERT_CACHE"
        raise SertError(f"could not write {path} ({e.strerror}); {fix}") from None

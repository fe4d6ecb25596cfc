"""Model folders in Hugging Face form: found, downloaded, checked, named."""

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sert_min.io import files, smollm2
from sert_min.io.download import cache, home
from sert_min.io.errors import SertError, need

# Named students: hub id and the commit that they are pinned to (None: whatever `main` is).
HUB = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "distilgpt2": ("distilbert/distilgpt2", "2290a62682d06624634c1f46a6ad5be0f47f38aa"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", None),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", None),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", None),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", None),
}
MICRO = Path(__file__).parents[1] / "micro" / "student"  # embedded
ARCHITECTURES = ("gpt2", "llama", "qwen2")  # values of model_type in config.json
CLASSES = r"'(GPT2|Llama|Qwen2)(LMHeadModel|DoubleHeadsModel|ForCausalLM|Model)'"
INDEX = "model.safetensors.index.json"  # names the files of weights in several files
WEIGHTS = ("model.safetensors", "model-*.safetensors", INDEX)
TOKENIZER = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
             "tokenizer.json", "tokenizer_config.json")  # fmt: skip


# --- reading -------------------------------------------------------------------------------------


def find_model(name: str) -> Path:
    """The folder of a model: `micro`, `smollm2`, a local folder, a named student or a hub id, which
    is downloaded once into the Hugging Face cache (HF_HUB_OFFLINE, HF_ENDPOINT hold)."""
    if name == "micro":
        return MICRO
    if name == "smollm2":
        return smollm2_folder()
    if is_local(name):  # a model folder, or a run of train.py / distill.py
        return local_folder(Path(name))
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    need(not is_path, f"--model {name}: no such folder; check the path")
    return download_model(name, *HUB.get(name, (name, None)))


def is_local(name: str) -> bool:
    """Does a name mean a folder here? A folder without a model does not hide a named student."""
    known = {*HUB, *(repo for repo, _ in HUB.values())}
    holds = any((Path(name) / model).exists() for model in ("config.json", "last"))
    return Path(name).is_dir() and (holds or name not in known)


def local_folder(folder: Path) -> Path:
    """The model in a local folder: a Hugging Face folder, or the `last` of a run."""
    if (folder / "last").is_dir():
        return folder / "last"
    if not any((folder / name).exists() for name in ("model.safetensors", INDEX)):
        adapter = (folder / "adapter_config.json").exists()
        need(not adapter, f"{folder} is an adapter; merge it into its base model first (peft's "
             "merge_and_unload, then save_pretrained)")  # fmt: skip
        steps = sorted(folder.glob("checkpoint-[0-9]*"), key=lambda p: (len(p.name), p))
        need(not steps, f"{folder} holds checkpoints only; give --model {steps and steps[-1]}")
    elif str(folder) in HUB:
        print(f"--model {folder} is the folder ./{folder} here, not the hub's {folder}")
    return folder


def smollm2_folder() -> Path:
    """The folder of SmolLM2 in the cache, made at the first call."""
    folder = cache() / f"{smollm2.LABEL}-{smollm2.SHA256[:8]}"
    with files.lock_folder(cache(), ".lock-smollm2", wait=True):
        if not folder.exists():
            tensors, texts = smollm2.convert()
            print(f"converting SmolLM2's weights, once, to {folder}")
            write_folder(folder, tensors, texts)
    return folder


def download_model(name: str, repo: str, revision: str | None) -> Path:
    """Fetch config, weights and tokenizer files of a hub repository; returns their folder, whose name
    is the commit. What the cache holds of a known commit is not asked for again."""
    if not os.environ.get("HF_HOME"):
        home()
    from huggingface_hub import hf_hub_download, snapshot_download  # late: half a second

    try:
        offline = not is_reachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        at = {"revision": revision, "local_files_only": offline}
        folder = Path(hf_hub_download(repo, "config.json", **at)).parent
        read_raw_config(folder)  # refuses another architecture before the large download
        at["revision"] = folder.name
        snapshot_download(repo, allow_patterns=[*WEIGHTS, *TOKENIZER], **at)
        return folder
    except SertError:
        raise
    except Exception as e:  # also of requests, httpx or httpx2, by the hub client's version
        raise SertError(f"model {name} {why_not(e)}") from None


def why_not(e: Exception) -> str:
    """What an error of the hub client means, and what to do."""
    from huggingface_hub import errors

    unknown = errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError
    status, local = http_status(e), isinstance(e, errors.LocalEntryNotFoundError)
    page = any(isinstance(one, errors.FileMetadataError) for one in (e, e.__cause__))
    disk = isinstance(e, OSError) and e.filename  # not an error of the network
    reason = (str(e) or type(e).__name__).splitlines()[0][:120]
    rows = (
        (status == 401, "is not on the hub, or needs a token; check the name, or set HF_TOKEN"),
        (status == 403, "is not open to you; accept its terms on the hub and set HF_TOKEN"),
        (status == 429, "can't be downloaded now: the hub has had too many requests from here; wait "
         "some minutes, or set HF_TOKEN"),
        (isinstance(e, unknown), "is no folder and not on the hub (or private); choose "
         f"{', '.join(HUB)}, a hub id, or a folder"),
        (page, "can't be downloaded: what answers is not the hub (a login page of this network?); "
         "log in to the network, or check HF_ENDPOINT"),
        (isinstance(e, errors.EntryNotFoundError) and not local,
         "has no config.json on the hub; is it a whole model (no adapter)?"),
        (status >= 400, f"can't be downloaded: the hub answers {status}; try again later, or check "
         "HF_ENDPOINT"),
        (local, "is not in the local cache and the hub can't be reached; check the network and "
         "HF_ENDPOINT, unset HF_HUB_OFFLINE, or give --model a folder"),
        (disk, f"can't be downloaded ({reason}); set HF_HOME to a writable folder"),
        (True, f"can't be downloaded ({reason}); try again"),
    )  # fmt: skip
    return next(why for holds, why in rows if holds)


def is_reachable(url: str) -> bool:
    """Does anything listen at `url`? The hub client would try six times. A proxy is trusted."""
    at = urlsplit(url)
    if {at.scheme, "all"} & getproxies().keys() and not proxy_bypass(at.hostname or ""):
        return True
    try:
        port = at.port or (80 if at.scheme == "http" else 443)
        socket.create_connection((at.hostname, port), timeout=10).close()
    except (OSError, ValueError):
        return False
    return True


def http_status(error: BaseException | None) -> int:
    """The HTTP status behind an error of the hub client; 0 if there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return 0


def read_raw_config(folder: Path) -> dict:
    """The JSON of config.json, if it is of an architecture that is known here."""
    raw = files.read_json(folder / "config.json")
    if not raw.get("model_type"):  # older files
        named = re.search(CLASSES, repr(raw.get("architectures")))
        raw["model_type"] = named[1].lower() if named else None
    kind, known = raw["model_type"], ", ".join(ARCHITECTURES)
    fix = f"choose one of {known}" if kind else f"set model_type in config.json to one of {known}"
    need(kind in ARCHITECTURES, f"{folder} holds a model of type {kind!r}; {fix}")
    return raw


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file(s) of a model folder. An index can't name a file outside of it."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.exists():
        return [whole]
    need(index.exists(), f"{folder} has no model.safetensors: repeat a download that was cut; pickle "
         "files are refused, convert them with transformers' save_pretrained")  # fmt: skip
    shards = files.read_json(index).get("weight_map")
    names = {str(n) for n in shards.values()} if isinstance(shards, dict) else set()
    plain = names and all(re.fullmatch(r"[\w.-]+\.safetensors", n) for n in names)
    need(plain, f"{index} has no usable weight_map; download the model again")
    found = [folder / name for name in sorted(names)]
    for file in found:
        need(file.exists(), f"{file} is missing; download the model again")
    return found


def weights_hash(folder: Path) -> str:
    """Hex SHA-256 over the weight files: a model's identity, wherever it lies."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)  # goes on with it
    return digest.hexdigest()


def read_sert(folder: Path) -> dict:
    """What a checkpoint of ours says of itself (method, parents, prompt suffix, ..); {} for others."""
    return files.stored_settings(folder / "sert.json")


def model_label(name: str, folder: Path) -> str:
    """The MODEL in output folders: the root parent's name, a local folder's with a hash behind."""
    local = is_local(name)
    if name == "smollm2":
        return smollm2.LABEL
    if name == "micro" or (name in HUB and not local):
        return name
    if root := read_sert(folder).get("root"):
        label = files.clean_name(str(root))
        return label if label.strip(".") else "model"  # not `..`: it becomes a folder
    if local:
        return f"{files.clean_name(Path(name).resolve().name)}-{weights_hash(folder)[:8]}"
    return name.replace("/", "--")


# --- tensors --------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything in a folder's weight files."""
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 (not iterable)
                    yield name, f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            told = f"{file} is not a whole safetensors file ({str(e)[:80]}); download it again"
            raise SertError(told) from None


def write_folder(
    folder: Path, tensors: dict[str, Tensor], texts: dict[str, dict], source: Path | None = None
) -> None:
    """Write a model folder, all or nothing: weights, JSON files, `source`'s tokenizer files."""
    with files.atomic_folder(folder) as part:
        weights = part / "model.safetensors"
        try:
            save_file(tensors, weights, metadata={"format": "pt"})
        except SafetensorError as e:  # its form of an OSError
            raise SertError(f"{folder} can't be written ({e}); free some space, repeat") from None
        for file, text in texts.items():
            (part / file).write_text(json.dumps(text, indent=1) + "\n")
        try:  # safetensors makes the file readable for its owner alone
            shutil.copymode(part / "config.json", weights)
        except OSError:
            files.warn_once("knows no file modes: perhaps only their owner can read the weights")
        for file in TOKENIZER:
            if source and (source / file).exists():
                shutil.copyfile(source / file, part / file)

"""Model folders in Hugging Face form: found, downloaded, checked, named."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sert_min.io import smollm2
from sert_min.io.errors import SertError
from sert_min.io.files import atomic_folder, read_json

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


# --- reading -------------------------------------------------------------------------------------


def find_model(name: str) -> Path:
    """The folder of a model: `micro`, `smollm2`, a local folder, a named student or a hub id.
    Hub files are downloaded once into the Hugging Face cache (HF_HUB_OFFLINE, HF_ENDPOINT hold).
    """
    if name == "micro":
        return MICRO
    if name == smollm2.NAME:
        return smollm2.smollm2_folder()
    if Path(name).is_dir():  # a model folder, or a run of train.py / distill.py
        return Path(name) / "last" if (Path(name) / "last").is_dir() else Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SertError(f"--model {name}: no such folder; check the path")
    repo, revision = HUB.get(name, (name, None))
    return download_model(name, repo, revision)


def download_model(name: str, repo: str, revision: str | None) -> Path:
    """Fetch config, weights and tokenizer files of a hub repository; returns their folder."""
    from huggingface_hub import errors, hf_hub_download  # late: it takes half a second

    def fetch(*files: str, optional: bool = False) -> Path | None:
        """The first of `files` that the repository has; None if it has none. Files of a known commit
        never change, so the cache is asked first. Offline, a file that is not cached may be one that
        the repository lacks, so all files are tried before that is an error."""
        unreachable = None
        tries = [(file, True) for file in files if revision] + [(file, False) for file in files]
        for file, only_cached in tries:
            try:
                path = hf_hub_download(repo, file, revision=revision, local_files_only=only_cached)
                return Path(path)
            except errors.LocalEntryNotFoundError:
                if not only_cached:
                    unreachable = unreachable or file
            except errors.EntryNotFoundError:
                pass
            except errors.HFValidationError:
                raise SertError(f"--model {name} is neither a folder nor a hub id") from None
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
                raise SertError(
                    f"model {name} is not on the hub (or is private); choose one of "
                    f"{', '.join(HUB)}, another hub id, or a local folder"
                ) from None
            except Exception as e:  # requests, httpx or httpx2 errors, by the hub client's version
                why = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
                raise SertError(
                    f"model {name}: download of {file} failed ({why}); try again"
                ) from None
        if unreachable and not optional:
            raise SertError(
                f"model {name}: {unreachable} is not in the local cache and the hub can't be "
                "reached; check the network and HF_ENDPOINT, unset HF_HUB_OFFLINE, or give --model "
                "a folder"
            )
        return None

    config = fetch("config.json")
    if config is None:
        raise SertError(f"model {name}: the hub repository has no config.json; is it a model?")
    revision = config.parent.name  # the commit: all other files come from the same one
    raw = read_raw_config(config.parent)  # refuses another architecture before the large download
    weights = fetch("model.safetensors", "model.safetensors.index.json")
    if weights is None:
        raise SertError(
            f"model {name} has no safetensors weights, and pickle files are refused; "
            "convert it with transformers' save_pretrained and give --model that folder"
        )
    if weights.suffix == ".json":
        for shard in shard_names(weights):
            if fetch(shard) is None:
                raise SertError(f"model {name}: {shard} is missing on the hub; choose another")
    tokenizer = fetch("tokenizer.json", "merges.txt")
    if tokenizer is not None and tokenizer.name == "merges.txt":
        fetch("vocab.json")
    elif raw["model_type"] != "gpt2":
        fetch("tokenizer_config.json", optional=True)  # transformers opens trained students by it
    return config.parent


def commit_of(folder: Path) -> str | None:
    """The commit that a folder in the Hugging Face cache was downloaded from."""
    return folder.name if folder.parent.name == "snapshots" else None


def read_raw_config(folder: Path) -> dict:
    """The JSON of config.json, if it is of an architecture that is known here."""
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in ARCHITECTURES:
        raise SertError(
            f"{folder} holds a model of type {raw.get('model_type')!r}; choose one of type "
            f"{', '.join(ARCHITECTURES)}"
        )
    return raw


def shard_names(index: Path) -> list[str]:
    """The file names in a safetensors index; plain names only, so that no path leaves the folder."""
    shards = read_json(index).get("weight_map")
    names = {str(n) for n in shards.values()} if isinstance(shards, dict) else set()
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", n) for n in names):
        raise SertError(f"{index} has no usable weight_map; download the model again")
    return sorted(names)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file(s) of a model folder."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        files = [folder / name for name in shard_names(folder / "model.safetensors.index.json")]
        for file in files:
            if not file.exists():
                raise SertError(f"{file} is missing; download the model again")
        return files
    raise SertError(
        f"{folder} has no model.safetensors; pickle weights (pytorch_model.bin) are refused, "
        "convert them with transformers' save_pretrained"
    )


def weights_hash(folder: Path) -> str:
    """Hex SHA-256 over the weight files: a model's identity, wherever it lies."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_sert(folder: Path) -> dict:
    """What a checkpoint of ours says of itself (method, parents, prompt suffix, ..); {} for others."""
    return read_json(folder / "sert.json") if (folder / "sert.json").exists() else {}


def model_label(name: str, folder: Path) -> str:
    """The MODEL part of output folders: the root parent's name, with 8 hex digits of the weights'
    hash for local folders."""
    if name == smollm2.NAME:
        return smollm2.LABEL
    if name == "micro" or (name in HUB and not Path(name).is_dir()):
        return name
    if root := read_sert(folder).get("root"):
        label = re.sub(r"[^\w.-]", "-", str(root))[:100]
        return label if label.strip(".") else "model"  # not `..`: it becomes a folder
    if Path(name).is_dir():
        return re.sub(r"[^\w.-]", "-", Path(name).resolve().name) + "-" + weights_hash(folder)[:8]
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
            raise SertError(
                f"{file} is not a whole safetensors file ({str(e)[:80]}); download it again"
            ) from None


def write_folder(
    folder: Path, tensors: dict[str, Tensor], config: dict, tokenizer_from: Path, sert: dict
) -> None:
    """Write a model folder, all or nothing. `tokenizer_from` is the folder whose tokenizer files go
    along; `sert` becomes sert.json."""
    with atomic_folder(folder) as part:
        try:
            save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as e:  # its form of an OSError
            raise SertError(
                f"{folder} can't be written ({e}); free some space and repeat"
            ) from None
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        # safetensors makes the file readable for its owner alone.
        shutil.copymode(part / "config.json", part / "model.safetensors")
        (part / "sert.json").write_text(json.dumps(sert, indent=1) + "\n")
        for file in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
            if (tokenizer_from / file).exists():
                shutil.copy(tokenizer_from / file, part / file)

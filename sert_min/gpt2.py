"""GPT-2: the model, and reading and writing it as a Hugging Face folder.

Decoder-only transformer with learned positions, LayerNorm before each half of a block and a head
that shares the token embedding (Radford et al. 2019; the names follow the published weights). One
thing is unusual: `forward` takes the attention as a function, so that training, prefill and the
sampler's decoding over shared prompts (decode.py) all run this one model.

Precision: linear layers compute in their weights' dtype (fp32 or bf16); the residual stream,
LayerNorm, embeddings and `logits` stay fp32. GPT-2's logits lie near -100, where bf16 numbers are
0.5 apart, so a rounded head would destroy the order of the best tokens. (The sampler's draws of a
bf16 model take a quicker head that is as good as fp32's: generate.make_draw.)

Another architecture: besides this file, prefill, own_memory and shared_attention take as many heads
of keys as of queries; positions reach no `attend`, so rotary ones belong before it; tokenizer.py
wants byte-level BPE with GPT-2's splitting; `sample.py --check` knows gpt2 124M.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cpu import linear
from sert_min.runtime import SertError
from sert_min.store import atomic_folder, read_json

# Named students: hub id and the commit that the weights are pinned to.
HUB = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "distilgpt2": ("distilbert/distilgpt2", "2290a62682d06624634c1f46a6ad5be0f47f38aa"),
}
MICRO = Path(__file__).parent / "micro_student"  # the embedded student of the micro-world
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "gelu_new": None,  # gelu_tanh, which `linear` takes together with the product
    "gelu_pytorch_tanh": None,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
ALIASES = {  # other names that transformers reads
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Conv1D of the published weights stores [in, out]; nn.Linear wants [out, in]. One of the four,
# attn.c_proj, is square: no shape check would notice a forgotten transpose.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass
class GPT2Config:
    """The fields of a Hugging Face GPT-2 config.json that change the computation."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position sees itself and what is before it. q (already scaled), k, v: [B, T, H, D]."""
    assert q.dim() == 4, "one text is ids [1, T], not [T]: the axes would be mixed up"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)


def product(x: Tensor, layer: nn.Linear, gelu_tanh: bool = False) -> Tensor:
    """A linear layer, in the dtype of its weight."""
    return linear(x.to(layer.weight.dtype), layer.weight, layer.bias, gelu_tanh)


class Attention(nn.Module):
    def __init__(self, c: GPT2Config, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, c.n_head
        self.scale = 1 / math.sqrt(c.n_embd // c.n_head) if c.scale_attn_weights else 1.0
        if c.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x: Tensor, attend) -> Tensor:
        qkv = product(x, self.c_attn)  # [.., C] -> [.., 3C]
        q, k, v = qkv.view(*x.shape[:-1], 3, self.n_head, -1).unbind(-3)  # [.., H, D] each
        out = attend(self.layer, q * self.scale, k, v)  # [.., H, D]
        return product(out.reshape(x.shape), self.c_proj)


class MLP(nn.Module):
    def __init__(self, c: GPT2Config):
        super().__init__()
        inner = c.n_inner or 4 * c.n_embd
        self.c_fc = nn.Linear(c.n_embd, inner)
        self.c_proj = nn.Linear(inner, c.n_embd)
        self.act = ACTIVATIONS[c.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        if self.act is None:
            return product(product(x, self.c_fc, gelu_tanh=True), self.c_proj)
        return product(self.act(product(x, self.c_fc)), self.c_proj)


class Block(nn.Module):
    def __init__(self, c: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon)
        self.attn = Attention(c, layer)
        self.ln_2 = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, attend) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)  # fp32 residual + dtype of the products
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        c = self.config = config
        # empty: init_weights_ or load_model fills them, and drawing on the meta device takes a second
        tokens, positions = (torch.empty(n, c.n_embd) for n in (c.vocab_size, c.n_positions))
        self.wte = nn.Embedding(*tokens.shape, _weight=tokens)
        self.wpe = nn.Embedding(*positions.shape, _weight=positions)
        self.h = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.n_embd, c.vocab_size, False)

    def forward(self, ids: Tensor, positions: Tensor | None = None, attend=causal_attention):
        """Hidden states after the last LayerNorm, fp32: ids [B, T] -> [B, T, C]. With an
        `attend` that knows what the rows are, ids [N] -> [N, C] (decoding, packed training).

        `positions` has the shape of ids (default 0..T-1 along the last axis);
        `attend(layer, q, k, v)` maps [.., H, D] queries, scaled, to [.., H, D]."""
        if positions is None:
            positions = torch.arange(ids.shape[-1], device=ids.device)
        x = self.wte(ids) + self.wpe(positions)  # [.., C]
        for block in self.h:
            x = block(x, attend)
        return self.ln_f(x)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, C]: the token embedding itself unless the model is untied."""
        return (self.wte if self.lm_head is None else self.lm_head).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [.., C] -> fp32 logits [.., V]; never rounded to bf16 on the way."""
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float(), self.head_weight)

    def cast_(self, dtype: torch.dtype) -> "GPT2":
        """Set the dtype of the linear layers' products; everything else stays fp32."""
        for block in self.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                layer.to(dtype)
        return self

    def init_weights_(self, seed: int) -> "GPT2":
        """GPT-2's initialisation: N(0, 0.02), residual projections / sqrt(2 L), biases 0."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                shrink = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1
                p.data.normal_(0, 0.02 / shrink, generator=g)
            elif name.endswith("bias"):
                p.data.zero_()
        return self

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())


@torch.inference_mode()
def first_broken(model: GPT2, ids: list[int]) -> str:
    """Where the numbers of a text first stop being finite, for the error of somebody who has seen
    a NaN: runs the model once more, layer by layer."""
    x = torch.tensor(ids, device=model.wte.weight.device)[None]
    steps = [("the embeddings", lambda x: model.wte(x) + model.wpe.weight[: x.shape[1]])]
    for i, block in enumerate(model.h):
        where = f"layer {i} of 0 to {len(model.h) - 1}"
        steps.append(
            (f"{where}, attention", lambda x, b=block: x + b.attn(b.ln_1(x), causal_attention))
        )
        steps.append((f"{where}, MLP", lambda x, b=block: x + b.mlp(b.ln_2(x))))
    steps += [("the last LayerNorm", model.ln_f), ("the head", model.logits)]
    for where, step in steps:
        x = step(x)
        if not x.isfinite().all():
            return f"first in {where}"
    return "not when run again"


# --- reading -------------------------------------------------------------------------------------


def find_model(name: str) -> Path:
    """The folder of a model: `micro`, a local folder, a named student or a hub id of GPT-2 form.
    Hub files are downloaded once into the Hugging Face cache (HF_HUB_OFFLINE, HF_ENDPOINT hold).
    """
    if name == "micro":
        return MICRO
    if Path(name).is_dir():  # a model folder, or a run of train.py / distill.py
        return Path(name) / "last" if (Path(name) / "last").is_dir() else Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SertError(f"--model {name}: no such folder; check the path")
    repo, revision = HUB.get(name, (name, None))
    return download_model(name, repo, revision)


def download_model(name: str, repo: str, revision: str | None) -> Path:
    """Fetch config, weights and tokenizer files of a hub repository; returns their folder."""
    from huggingface_hub import errors, hf_hub_download

    def fetch(*files: str) -> Path | None:
        """The first of `files` that the repository has. Files of a known commit never change, so
        they are looked for in the cache first; offline, one that is not cached may be one that
        the repository lacks, so all are tried before that is an error."""
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
                    f"{', '.join(HUB)}, another GPT-2 hub id, or a local folder"
                ) from None
            except Exception as e:  # requests, httpx or httpx2 errors, by the hub client's version
                why = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
                raise SertError(
                    f"model {name}: download of {file} failed ({why}); try again"
                ) from None
        if unreachable:
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
    read_config(config.parent)  # refuse another architecture before the large download
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
    tokenizer = fetch("merges.txt", "tokenizer.json")
    if tokenizer is not None and tokenizer.name == "merges.txt":
        fetch("vocab.json", "tokenizer.json")
    return config.parent


def read_config(folder: Path) -> GPT2Config:
    """config.json -> GPT2Config; options that would change the computation are honoured or
    refused by name."""
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "gpt2":
        raise SertError(
            f"{folder} holds a model of type {raw.get('model_type')!r}, not gpt2; "
            "choose a GPT-2 model"
        )
    if raw.get("add_cross_attention"):
        raise SertError(f"{folder}/config.json asks for add_cross_attention, which GPT2 here lacks")
    raw = {ALIASES.get(k, k): v for k, v in raw.items() if ALIASES.get(k) not in raw}
    known = {f.name: raw[f.name] for f in fields(GPT2Config) if f.name in raw}
    config = GPT2Config(**known)
    if str(config.activation_function) not in ACTIVATIONS:
        raise SertError(
            f"{folder}/config.json: activation_function {config.activation_function!r} is unknown; "
            f"known are {', '.join(ACTIVATIONS)}"
        )
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        n, most = getattr(config, name), 1000 if name == "n_layer" else 2**24  # each layer is built
        if not (type(n) is int and 0 < n < most) and not (name == "n_inner" and n is None):
            raise SertError(f"{folder}/config.json: {name} {n!r} is no size; fix the file")
    if config.n_embd % config.n_head:
        raise SertError(
            f"{folder}/config.json: n_embd {config.n_embd} can't be shared by n_head "
            f"{config.n_head}; fix the file"
        )
    epsilon = config.layer_norm_epsilon
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise SertError(
            f"{folder}/config.json: layer_norm_epsilon {epsilon!r} is no small number; fix the file"
        )
    return config


def shard_names(index: Path) -> list[str]:
    """File names in a safetensors index; only plain names, so that no path leaves the folder."""
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
    """Hex SHA-256 over the weight files: what a model is, wherever it lies."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def load_model(folder: Path, device="cpu", dtype=torch.float32) -> GPT2:
    """GPT2 from a Hugging Face folder; every name and shape is checked, Conv1D is transposed."""
    import safetensors
    from safetensors import safe_open

    config = read_config(folder)
    with torch.device("meta"):
        model = GPT2(config)
    wanted = {name: p.shape for name, p in model.state_dict().items()}
    tensors = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                for raw_name in f.keys():  # noqa: SIM118 (not iterable)
                    name = raw_name.removeprefix("transformer.")
                    if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
                        continue  # the causal mask, stored as a buffer in old files
                    if name not in wanted and name != "lm_head.weight":
                        raise SertError(f"{file}: unexpected tensor {raw_name}; is this a GPT-2?")
                    t = f.get_tensor(raw_name)
                    tensors[name] = (t.t() if name.endswith(TRANSPOSED) else t).float().contiguous()
        except (safetensors.SafetensorError, OSError) as e:
            raise SertError(
                f"{file} is not a whole safetensors file ({str(e)[:80]}); download it again"
            ) from None
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if "wte.weight" in tensors and not torch.equal(head, tensors["wte.weight"]):
            raise SertError(
                f"{folder}: lm_head.weight is not wte.weight, though config.json ties them; set "
                "tie_word_embeddings to false there"
            )
    for name, shape in wanted.items():
        if name not in tensors:
            raise SertError(
                f"{folder}: tensor {name} is missing; the weights do not fit config.json"
            )
        if tensors[name].shape != shape:
            raise SertError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, config.json needs "
                f"{list(shape)}; the weights do not fit config.json"
            )
        if not tensors[name].isfinite().all():
            raise SertError(
                f"{folder}: {name} holds NaN or infinite weights; use another checkpoint"
            )
    model.load_state_dict(tensors, assign=True)
    return model.cast_(dtype).to(device).eval()


def read_sert(folder: Path) -> dict:
    """What a checkpoint says of itself (method, parents, prompt suffix, ..); {} for a foreign one."""
    return read_json(folder / "sert.json") if (folder / "sert.json").exists() else {}


def model_label(name: str, folder: Path) -> str:
    """The MODEL part of output folders: the root parent's name, with 8 hex digits of the weights'
    hash for local folders."""
    if name == "micro" or (name in HUB and not Path(name).is_dir()):
        return name
    if root := read_sert(folder).get("root"):
        label = re.sub(r"[^\w.-]", "-", str(root))[:100]
        return label if label.strip(".") else "model"  # not `..`: it becomes a folder
    if Path(name).is_dir():
        return re.sub(r"[^\w.-]", "-", Path(name).resolve().name) + "-" + weights_hash(folder)[:8]
    return name.replace("/", "--")


# --- writing -------------------------------------------------------------------------------------


def save_model(model: GPT2, folder: Path, tokenizer_from: Path, sert: dict) -> None:
    """Write a Hugging Face GPT-2 folder (atomic): opens in transformers, vLLM, lm-eval as it is.
    `tokenizer_from` is the folder whose tokenizer files go along; `sert` becomes sert.json."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {}
    for name, p in model.state_dict().items():
        t = p.detach().float().cpu()
        tensors[name] = (t.t() if name.endswith(TRANSPOSED) else t).contiguous()
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **asdict(model.config),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
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

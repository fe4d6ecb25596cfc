"""GPT-2: the model, and how a Hugging Face folder becomes one and back.

GPT-2 is a decoder-only transformer with learned positions, LayerNorm before each half of a block, and
a head that shares the token embedding (Radford et al. 2019; names follow the published weights). One
thing is unusual here: `forward` takes the attention as a function, so training, prefill and the
sampler's decoding over shared prompts (decode.py) all run this one model.

Linear layers compute in their weights' dtype (fp32 or bf16). The residual stream, LayerNorm, embeddings
and `logits` stay fp32: GPT-2's logits lie near -100, where bf16 numbers are 0.5 apart, so a rounded head
would destroy the order of the best tokens. (For a bf16 model the sampler has a quicker head that is as
good as fp32's: decode.make_draw.)
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fast.cpu import linear
from sert_min.io.errors import SertError
from sert_min.io.hub import check_tensors, read_raw_config, read_tensors, write_folder

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
    """Attention of each position to itself and to what is before it. q (already scaled), k and v are
    [B, T, H, D], and so is the result."""
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
        # Empty, because init_weights_ or load_model fills them, and drawing takes a second.
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
    """Where the numbers first stop being finite: the model runs once more on a text, layer by layer.
    This is for the error message of a caller that has seen a NaN."""
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


def read_config(folder: Path) -> GPT2Config:
    """The GPT2Config of a folder's config.json. Options that would change the computation are honoured
    or refused by name."""
    raw = read_raw_config(folder)
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


def load_model(folder: Path, device="cpu", dtype=torch.float32) -> GPT2:
    """Read GPT2 from a Hugging Face folder. Every name and shape is checked, and the weights that
    Conv1D stores transposed are turned."""
    config = read_config(folder)
    with torch.device("meta"):
        model = GPT2(config)
    wanted = {name: p.shape for name, p in model.state_dict().items()}
    tensors = {}
    for raw_name, t in read_tensors(folder):
        name = raw_name.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
            continue  # the causal mask, which old files store as a buffer
        if name not in wanted and name != "lm_head.weight":
            raise SertError(f"{folder}: unexpected tensor {raw_name}; is this a GPT-2?")
        tensors[name] = (t.t() if name.endswith(TRANSPOSED) else t).float().contiguous()
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if "wte.weight" in tensors and not torch.equal(head, tensors["wte.weight"]):
            raise SertError(
                f"{folder}: lm_head.weight is not wte.weight, though config.json ties them; set "
                "tie_word_embeddings to false there"
            )
    check_tensors(folder, tensors, wanted)
    model.load_state_dict(tensors, assign=True)
    return model.cast_(dtype).to(device).eval()


def save_model(model: GPT2, folder: Path, tokenizer_from: Path, sert: dict) -> None:
    """Write a Hugging Face GPT-2 folder, all or nothing. It opens in transformers, vLLM and lm-eval as
    it is. `tokenizer_from` is the folder whose tokenizer files are copied; `sert` becomes sert.json."""
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
    write_folder(folder, tensors, config, tokenizer_from, sert)

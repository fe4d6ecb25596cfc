"""GPT-2: a decoder-only transformer with learned positions, LayerNorm before each half of a block, and
a head that shares the token embedding (Radford et al. 2019; names follow the published weights).

One thing is unusual here: `forward` takes the attention as a function, so training, prefill and the
sampler's decoding over shared prompts (decode.py) all run this one model.

Linear layers compute in their weights' dtype (fp32 or bf16). The residual stream, LayerNorm, embeddings
and `logits` stay fp32: GPT-2's logits lie near -100, where bf16 numbers are 0.5 apart, so a rounded head
would destroy the order of the best tokens. (For a bf16 model the sampler has a quicker head that is as
good as fp32's: decode.make_draw.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sert_min.kernels.fast.cpu import linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "gelu_new": None,  # gelu_tanh, which `linear` takes together with the product
    "gelu_pytorch_tanh": None,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


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

    @property
    def n_kv_head(self) -> int:
        """Heads of the keys and values; a Llama may have fewer than of queries."""
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each position to itself and to what is before it. q (already scaled), k and v are
    [B, T, H, D], and so is the result. k and v may have fewer heads, each for as many of q's."""
    assert q.dim() == 4, "one text is ids [1, T], not [T]: the axes would be mixed up"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    given = {"is_causal": True, "scale": 1.0, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, **given).transpose(1, 2)


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
        x = product(x, self.c_fc, gelu_tanh=self.act is None)
        return product(self.act(x) if self.act else x, self.c_proj)


class Block(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.ln_1, self.attn = norm(), attn
        self.ln_2, self.mlp = norm(), mlp

    def forward(self, x: Tensor, attend) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)  # fp32 residual + dtype of the products
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        c = self.config = config
        norm = partial(nn.LayerNorm, c.n_embd, c.layer_norm_epsilon)
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.n_positions, c.n_embd)
        self.h = nn.ModuleList(Block(norm, Attention(c, i), MLP(c)) for i in range(c.n_layer))
        self.ln_f = norm()
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.n_embd, c.vocab_size, False)

    def forward(self, ids: Tensor, positions: Tensor | None = None, attend=causal_attention):
        """Hidden states after the last LayerNorm, fp32: ids [B, T] -> [B, T, C]. With an `attend`
        that knows what the rows are, ids [N] -> [N, C] (decoding, packed training).

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
        for layer in self.h.modules():
            if isinstance(layer, nn.Linear):
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

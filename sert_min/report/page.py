"""The page: one self-contained HTML file that shows the paths of a run of sample.py.

The page needs no server, no other file and no network: its Content-Security-Policy forbids every
request. Texts of models and data sets are not trusted: they travel as JSON that holds no `<`, and
the page inserts them as text only. page.html is the template: style, script and three slots.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sert_min import filters, patterns
from sert_min.io.errors import need
from sert_min.io.files import read_json, read_jsonl, write_atomic
from sert_min.questions import question_in

TEMPLATE = Path(__file__).with_name("page.html")
SLIDERS = "pattern", "length", "repetition", "perplexity", "answer"  # rules that page.html applies
LIMIT = 200  # questions of a page; 5.4 MB if every path has 128 tokens


def write_page(
    folder: Path, out: Path | str, tokenizer, title="", limit=LIMIT, command="python sample.py"
) -> int:
    """Write the page of a run folder of sample.py to `out`; returns how many questions it shows.
    These are the first `limit`; the chart of the rules counts all. `tokenizer` is the one of the
    model that sampled the paths, `command` the one that filters them anew."""
    settings, funnel = read_json(folder / "settings.json"), read_json(folder / "funnel.json")
    limits = funnel["rules"]
    vocab: dict[int, int] = {}  # the page's own numbers of tokens, in order of their first use
    questions: dict[tuple, dict] = {}
    for r in read_jsonl(folder / "paths.jsonl"):
        name = r["task"], r["id"]
        if name not in questions and len(questions) == limit:
            break
        new = {"id": r["id"], "q": r["question"], "a": r["answer"], "paths": []}
        path = compact_path(r, tokenizer, vocab, limits)
        questions.setdefault(name, new)["paths"].append(path)
    data = {
        "title": title or "Latent reasoning, seen",
        "source": [settings[k] for k in ("task", "model", "split") if k in settings],
        "early": bool(settings.get("early_reject")),
        "branches": 0 if settings.get("raw") else settings.get("branches", 0),
        "samples": settings.get("samples", 0),
        "limits": limits,
        "rules": [[r.name, filters.words(r, limits[r.flag]), r.flag, r.words]
                  for r in filters.RULES if r.flag in limits],
        "dropped": filters.DROPPED,
        "command": command,
        "counts": funnel["counts"],
        "questions": list(questions.values()),
        "vocab": [tokenizer.to_bytes[i].decode("utf-8", "replace") for i in vocab],
    }  # fmt: skip
    write_atomic(out, fill_template(data))
    return len(questions)


# --- one path -------------------------------------------------------------------------------------


def token_texts(token_bytes: Sequence[bytes]) -> list[str]:
    """The text of each token. A character that is split over tokens belongs to the last of them,
    so the others may be empty; joined they are `patterns.decode(token_bytes)`.

    >>> token_texts([b"a", b"\\xe2\\x82", b"\\xac!"])
    ['a', '', '€!']
    """
    text, ends = patterns.decode(token_bytes), patterns.characters_complete(token_bytes)
    return [text[a:b] for a, b in zip([0, *ends], ends)]


def compact_path(r: Mapping, tokenizer, vocab: dict[int, int], limits: Mapping) -> list:
    """A record as the page wants it: [branch, sample, token numbers, -1000 x log-prob, path_start,
    path_end, finish, perplexity, rep-2, verdict, breaking token or -1, what it states of the
    answer, rules without a slider that it breaks by `limits`, {token: text}]; the last, if there are
    any, holds tokens that share a character with a neighbour."""
    unknown = [i for i in r["token_ids"] if i not in tokenizer.to_bytes]
    need(not unknown, f"question {r['id']} has a token that this model's tokenizer lacks")
    token_bytes = [tokenizer.to_bytes[i] for i in r["token_ids"]]
    numbers = [vocab.setdefault(i, len(vocab)) for i in r["token_ids"]]
    start, end = r["path_start"], r["path_end"]
    pieces = token_bytes[:start], token_bytes[start:end], token_bytes[end:]  # each has its own look
    texts = [text for piece in pieces for text in token_texts(piece)]
    alone = [b.decode("utf-8", "replace") for b in token_bytes]
    split = {i: t for i, (t, own) in enumerate(zip(texts, alone)) if t != own}
    minus = [round(-1000 * lp) for lp in r["logprobs"]]
    path = [r["branch"], r["sample"], numbers, minus, start, end]
    path += [r["finish"], r["perplexity"], r["rep2"], r["verdict"], breaking_token(r, token_bytes)]
    ids, logprobs, question = r["token_ids"][start:end], r["logprobs"][:end], question_in(r)
    seen = filters.Path(ids, logprobs, r["text"], {}, question)
    others = [rule for rule in filters.RULES if rule.name not in SLIDERS]
    broken = [rule.name for rule in others if filters.first_broken(seen, limits, [rule])]
    path += [filters.answers_stated(r["text"], question), broken]
    return [*path, split] if split else path


def breaking_token(r: Mapping, token_bytes: Sequence[bytes]) -> int:
    """Index in `token_ids` of the token with which a path breaks its pattern rule, else -1."""
    rule, _, kind = r["verdict"].partition(":")
    if rule != "pattern" or kind == "direct":  # a bare answer is one as a whole
        return -1
    found = filters.path_breaks(r, token_bytes, question_in(r))
    return r["path_start"] + found[kind] if kind in found else -1


# --- the page -------------------------------------------------------------------------------------


def fill_template(data: dict) -> str:
    """The whole page. All slots are filled in one pass, so text in the data that looks like a slot
    stays text. The JSON is ASCII without any character that has a meaning in HTML. The policy
    allows this very style and script and nothing else, above all no request."""
    template = TEMPLATE.read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("style", "script"):
        (code,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    slots = {"title": html.escape(data["title"]), "policy": policy, "data": text}
    return re.sub(r"\{\{(\w+)\}\}", lambda m: slots[m[1]], template)

"""The window: one self-contained HTML page that shows the paths of one run, or of two side by side.

The page needs no server, no other file and no network: its Content-Security-Policy forbids every
request. Texts of models and data sets are not trusted: they travel as JSON that holds no `<`, and
the page inserts them as text only. page.html is the template: style, script and three slots.
"""

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from sert_min import filters, patterns
from sert_min.io.errors import SertError
from sert_min.io.files import PATH, read_json, read_jsonl, write_atomic
from sert_min.questions import CHOICES, LETTERS, Question
from sert_min.tokenizer import Tokenizer

TEMPLATE = Path(__file__).with_name("page.html")
LIMIT = 200  # questions of a page; 5.4 MB if every path has 128 tokens


def write_page(
    runs: Sequence[Path | str],
    out: Path | str,
    tokenizer: Tokenizer,
    title: str | None = None,
    labels: Sequence[str] = ("Before self-training", "After self-training"),
    limit: int = LIMIT,
) -> int:
    """Write the page of one run folder of sample.py, or of two (before, after), to `out`.

    `tokenizer` belongs to the models of all runs: a record whose text it does not give is an error.
    Holds the first `limit` questions that all runs have; the filter charts count whole runs.
    Returns the number of questions on the page."""
    folders = [Path(run) for run in runs]
    if len(folders) not in (1, 2):
        raise SertError(f"a page shows one run or two, not {len(folders)}")
    if limit < 1:
        raise SertError("a page needs at least one question")
    settings = [read_json(folder / "settings.json") for folder in folders]
    heads, names = zip(*(read_run(f, s) for f, s in zip(folders, settings)))
    common = [name for name in names[0] if all(name in other for other in names)]
    if not common:
        raise SertError(f"{' and '.join(map(str, folders))} have no question in common")
    chosen = common[:limit]
    for head, label in zip(heads, labels if len(folders) > 1 else ("",)):
        head["label"] = label
    vocab = Vocabulary(tokenizer)
    data = {
        "title": title or "Latent reasoning, seen",
        "task": settings[0].get("task", ""),
        "total": len(common),
        "runs": heads,
        "questions": page_questions(folders, chosen, vocab),
    }
    data["vocab"] = vocab.texts
    write_atomic(out, fill_template(data))
    return len(chosen)


# --- what stands in a run folder ------------------------------------------------------------------


def records_of(folder: Path) -> Iterator[dict]:
    """The path records of a run folder; what was not written by sample.py is an error."""
    for number, r in enumerate(read_jsonl(folder / "paths.jsonl", PATH), 1):
        if len(r["token_ids"]) != len(r["logprobs"]):
            raise SertError(
                f"{folder / 'paths.jsonl'} line {number} has more tokens than log-probs, or fewer; "
                "sample into a new folder"
            )
        yield r


def read_run(folder: Path, settings: dict) -> tuple[dict, dict]:
    """(what the page says about a run, its question names {(task, id): None} in order)."""
    names: dict[tuple, None] = {}

    def seen():
        for r in records_of(folder):
            names[r["task"], r["id"]] = None
            yield r

    counts = asdict(filters.count_verdicts(seen()))
    if not names:
        raise SertError(f"{folder / 'paths.jsonl'} is empty; let sample.py finish first")
    rules = ("patterns", "min_tokens", "max_rep2", "min_perplexity")
    head = {
        "counts": counts,
        "rules": {k: settings.get(k) for k in rules},
        "early": bool(settings.get("early_reject")),
        "branches": 0 if settings.get("raw") else settings.get("branches", 0),
        "samples": settings.get("samples", 0),
        "settings": {k: settings[k] for k in ("model", "split") if k in settings},
    }
    return head, names


def page_questions(folders: Sequence[Path], chosen: list[tuple], vocab: "Vocabulary") -> list:
    """[{id, q, a, runs}] in the order of `chosen`; `runs` holds a list of paths per run folder."""
    found: dict[tuple, dict] = {}
    wanted = set(chosen)
    for i, folder in enumerate(folders):
        for r in records_of(folder):
            name = r["task"], r["id"]
            if name not in wanted:
                continue
            entry = found.setdefault(
                name,
                {
                    "id": r["id"],
                    "q": r["question"],
                    "a": r["answer"],
                    "runs": [[] for _ in folders],
                },
            )
            if entry["q"] != r["question"]:
                raise SertError(f"question {r['id']} differs between {folders[0]} and {folder}")
            entry["runs"][i].append(compact_path(r, vocab))
    return [found[name] for name in chosen]


# --- one path -------------------------------------------------------------------------------------


class Vocabulary:
    """The page's own numbering of the tokens that it holds, first come first."""

    def __init__(self, tokenizer: Tokenizer):
        self.to_bytes = tokenizer.to_bytes
        self.texts: list[str] = []
        self.number: dict[int, int] = {}

    def __getitem__(self, token_id: int) -> int:
        if token_id not in self.number:
            self.number[token_id] = len(self.texts)
            self.texts.append(self.to_bytes[token_id].decode("utf-8", "replace"))
        return self.number[token_id]


def token_texts(token_bytes: Sequence[bytes]) -> list[str]:
    """The text of each token. A character that is split over tokens belongs to the last of them,
    so the others may be empty; joined they are `filters.decode(token_bytes)`.

    >>> token_texts([b"a", b"\\xe2\\x82", b"\\xac!"])
    ['a', '', '€!']
    """
    text, ends = patterns.decode(token_bytes), patterns.characters_complete(token_bytes)
    return [text[a:b] for a, b in zip([0, *ends], ends)]


def compact_path(r: dict, vocab: Vocabulary) -> list:
    """A record as the page wants it: [branch, sample, token numbers, -1000 x log-prob, path_start,
    path_end, finish, perplexity, rep-2, verdict, breaking token or -1, {token: text}]; the last
    holds the texts of tokens that share a character with a neighbour."""
    try:
        token_bytes = [vocab.to_bytes[i] for i in r["token_ids"]]
        numbers = [vocab[i] for i in r["token_ids"]]
    except KeyError as e:
        raise SertError(
            f"question {r['id']} has token {e}, which this model's tokenizer lacks: take the "
            "model that the paths were sampled from"
        ) from None
    start, end = r["path_start"], r["path_end"]
    if patterns.decode(token_bytes[start:end]) != r["text"]:
        raise SertError(
            f"the text of question {r['id']} is not what this model's tokenizer makes of its "
            "tokens: take the model that the paths were sampled from"
        )
    # the same three pieces that have a look of their own on the page
    texts = [t for a, b in ((0, start), (start, end), (end, None)) for t in
             token_texts(token_bytes[a:b])]  # fmt: skip
    split = {i: t for i, (n, t) in enumerate(zip(numbers, texts)) if vocab.texts[n] != t}
    minus = [round(-1000 * lp) for lp in r["logprobs"]]
    perplexity = r["perplexity"] and round(r["perplexity"], 4)
    path = [r["branch"], r["sample"], numbers, minus, start, end, r["finish"], perplexity]
    path += [round(r["rep2"], 4), r["verdict"], breaking_token(r, token_bytes)]
    return [*path, split] if split else path


def breaking_token(r: dict, token_bytes: list[bytes]) -> int:
    """Index in `token_ids` of the token with which a path breaks its pattern rule; -1 if unknown."""
    kind = r["verdict"].removeprefix("pattern:")
    if kind == r["verdict"] or kind == "direct":  # a bare answer is one as a whole
        return -1
    question = Question(r["task"], r["id"], r["question"], r["answer"], choices_of(r["question"]))
    start = r["path_start"]
    found = patterns.break_token(token_bytes[start:], question, (kind,), r["finish"] != "rejected")
    return start + found[1] if found else -1


def choices_of(question: str) -> tuple[str, ...]:
    """The option texts in a question as it stands in the prompt; () for a yes/no question.

    >>> choices_of("Where? Answer choices: (A) bank, (B) shop, mall")
    ('bank', 'shop, mall')
    """
    _, found, listed = question.partition(CHOICES + "(A) ")
    return tuple(re.split(rf", \([{LETTERS[1:]}]\) ", listed)) if found else ()


# --- the page -------------------------------------------------------------------------------------


def script_json(data) -> str:
    """JSON that can stand inside <script>: ASCII, and no character with a meaning in HTML."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def content_policy(template: str) -> str:
    """A policy that allows this very style and script and nothing else, above all no request."""
    hashes = []
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes.append(f"{tag}-src 'sha256-{digest}'")
    return f"default-src 'none'; {'; '.join(hashes)}; base-uri 'none'; form-action 'none'"


def fill_template(data: dict) -> str:
    """The whole page. One pass over the slots: what looks like a slot in the data stays text."""
    template = TEMPLATE.read_text(encoding="utf-8")
    slots = {
        "title": html.escape(data["title"]),
        "policy": content_policy(template),
        "data": script_json(data),
    }
    used = Counter(re.findall(r"\{\{(\w+)\}\}", template))
    assert set(used) == set(slots), f"page.html has the slots {sorted(used)}"
    return re.sub(r"\{\{(\w+)\}\}", lambda m: slots[m[1]], template)

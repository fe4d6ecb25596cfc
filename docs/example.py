"""One question of the micro-world on its way through the whole method, as a page.

    python docs/example.py              # writes docs/example.md, in about 15 seconds on one core

Every id, log-prob, verdict and answer of the page comes out of the program's own functions while
the page is written; tests/test_example.py writes it again and compares.
"""

import contextlib
import io
import os
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distill
import sample
from kernels import reference
from sert_min import answers, filters, finetune, metrics, prompts, rationales, tasks
from sert_min.generate import first_rows, prefill, stream_of
from sert_min.micro import program

N_QUESTIONS, FOLLOWED = 64, 3  # two blocks; of them this one, which the training leaves out
EPOCHS, BATCH, LR = 3, 8, 3e-4
SHOWN = 33  # places of the training example


# --- Markdown -------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Paragraphs, wrapped."""
    paragraphs = (" ".join(p.split()) for p in text.strip().split("\n\n"))
    wrap = {"width": 100, "break_long_words": False, "break_on_hyphens": False}
    return "\n\n".join(textwrap.fill(p, **wrap) for p in paragraphs)


def code(text: str, width: int = 200) -> str:
    """Model text as a code span."""
    text = text.replace("\n", "\\n")
    return f"`{text if len(text) <= width else text[: width - 2] + '..'}`"


def block(text: str) -> str:
    return "```text\n" + text.strip("\n") + "\n```"


def table(head: str, rows) -> str:
    """`head` names the columns, separated by |."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


# --- the steps ------------------------------------------------------------------------------------


def question(run, q) -> list[str]:
    text = prompts.question_prompt(q, run.suffix)
    ids = run.tokenizer.encode(text)
    about = f"""
        `tasks.load` -> `prompts.question_prompt` -> `Tokenizer.encode` (paper: §II-A-1, Fig. 2)

        Question {q.id}, gold answer `{q.answer}`, written {code(q.write())}. The
        options stand in the question's text, as in CommonsenseQA. The prompt ends without a space:
        in GPT-2's byte-level BPE the space belongs to the word behind it, so every first token
        below brings its own."""
    listed = block(textwrap.fill(str(ids), 96))
    return ["## 1. Question, prompt, ids", prose(about), block(text), f"{len(ids)} ids:", listed]


@torch.inference_mode()
def branching(run, q) -> list[str]:
    prompt = run.tokenizer.encode(prompts.question_prompt(q, run.suffix))
    logits = run.model.logits(prefill(run.model, [prompt]).hidden)[:, : run.tokenizer.n_vocab]
    rows = first_rows(logits, [f"{q.task}/{q.id}"], run.s, run.tokenizer.eot)
    about = """
        `decode.prefill`, `generate.first_rows` (paper: §II-A-1)

        The prompt runs through the model once; its keys and values are kept and shared by all 25
        paths. At its end the five most probable first tokens become five branches. This is where
        the method looks for reasoning: a path that the model would begin with low probability gets
        as many samples as the one it prefers. Log-probs are natural logarithms, at temperature 1
        over the whole vocabulary."""
    shown = [
        (r.branch, r.token_ids[0], code(run.tokenizer.decode(r.token_ids)), f"{r.logprobs[0]:.3f}")
        for r in rows[:: run.s.samples]
    ]
    found = table("branch | id | token | log-prob", shown)
    return ["## 2. Prefill and branching", prose(about), found]


@torch.inference_mode()
def drawing(run, q, path) -> list[str]:
    tokenizer, s, ids = run.tokenizer, run.s, path["token_ids"]
    rest = path["logprobs"][1:]
    at = 1 + rest.index(min(rest))  # the least certain draw
    stream = torch.tensor([stream_of(f"{q.task}/{q.id}", path["branch"], path["sample"])])
    prompt = tokenizer.encode(prompts.question_prompt(q, run.suffix))
    logits = run.model.logits(run.model(torch.tensor([prompt + ids[:at]]))[:, -1])
    logits = logits[:, : tokenizer.n_vocab]
    given = {"top_k": s.top_k, "top_p": s.top_p, "temperature": s.temperature, "seed": s.seed}
    token, logprob = reference.sample_and_score(logits, streams=stream, position=at, **given)
    assert token.item() == ids[at] and abs(logprob.item() - rest[at - 1]) < 1e-3  # the same draw
    best, candidates = reference.best_first(logits, s.top_k)
    p = (best - logits.logsumexp(-1, keepdim=True)).exp()[0]
    before = (p.cumsum(0) - p) / p.sum()
    shown = []
    for i, p_i, before_i in zip(candidates[0].tolist(), p.tolist(), before.tolist()):
        fate = "drawn" if i == token else "kept" if before_i < s.top_p else "cut by top-p"
        shown.append((i, code(tokenizer.decode([i])), f"{p_i:.4f}", f"{before_i:.4f}", fate))
    u = reference.uniform(s.seed, stream, torch.tensor([at])).item()
    about = f"""
        `decode.Decoder.step`, `kernels.head_sample_and_score` (paper: §II-A-1, §III-A)

        Branch {path["branch"]}, sample {path["sample"]}. The first token has log-prob
        {path["logprobs"][0]:.3f}; the mean of the others is {sum(rest) / len(rest):.3f}. Reasoning
        is latent in this sense: it is rarely begun, and easily continued."""
    draw = f"""
        The least certain draw is the one at position {at}. Top-k leaves {s.top_k} candidates, best
        first; top-p drops those with at least {s.top_p} of the ten's mass before them. The kept
        ones are walked in the order of their ids until their cumulative probability passes one
        uniform number, here {u:.3f}. That number is a function of the seed, the path's name and
        the position alone: the same in any batch and after any restart. The recorded log-prob is the one before the cuts: {rest[at - 1]:.3f}."""
    tokens = [
        (n, i, code(tokenizer.decode([i])), f"{lp:.3f}")
        for n, (i, lp) in enumerate(zip(ids, path["logprobs"]))
    ]
    return [
        "## 3. One path, token by token",
        prose(about),
        table("position | id | token | log-prob", tokens),
        prose(draw),
        table("id | token | probability | mass before it | ", shown),
    ]


def filtering(run, records, path) -> list[str]:
    funnel = io.StringIO()
    with contextlib.redirect_stdout(funnel):
        sample.print_funnel(filters.count_verdicts(records), run.rules)
    rows = []
    for r in records:
        facts = r["path_end"] - r["path_start"], r["finish"]
        facts += f"{r['perplexity']:.3f}", f"{r['rep2']:.3f}", r["verdict"]
        rows.append((f"{r['branch']}.{r['sample']}", code(r["text"], 64), *facts))
    about = """
        `generate.sample_block`, `filters.judge_path` (paper: §II-A-2, Fig. 2)

        Branch and sample; the path; its tokens; how it ended (`eos`: by itself); perplexity; rep-2,
        the share of repeated bigrams; verdict. The verdict names the first rule that a path breaks.
        Dropped paths stay in `paths.jsonl` with all of this. A short answer with a word that is
        none of the options is no `pattern:direct`: it is left to the length rule."""
    rules = """
        `filters.count_verdicts`, `filters.select`, `sample.print_funnel` (paper: §II-A-2, §III-A)

        Each rule sees what the one before it left. The thresholds are the micro-world's
        (`micro.PRESET`); the paper's are 25 tokens, rep-2 0.2, perplexity 5. No rule looks at the
        gold answer: a selected path can be wrong."""
    selected = f"""
        Of the paths that passed, the one with the lowest rep-2 is selected (ties: lowest branch,
        then lowest sample): {path["branch"]}.{path["sample"]}, {code(path["text"])}. A path that
        says a thing twice has more repeated bigrams."""
    return [
        "## 4. All 25 continuations",
        prose(about),
        table("path | text | tokens | finish | perplexity | rep-2 | verdict", rows),
        "## 5. What the rules dropped, and the selected path",
        prose(rules),
        block(funnel.getvalue()),
        prose(selected),
    ]


def selected_examples(run, q, records) -> tuple[tuple, list]:
    """(training example of q, those of the other questions)"""
    by_id, person = {x.id: x for x in run.questions}, program.parse_question(q).person
    examples = {}
    for r in records:
        text, _ = answers.strip_answer_sentence(r["text"])
        if r["verdict"] == "selected" and text:
            pair = prompts.sert_pair(by_id[r["id"]], text)
            examples[r["id"]] = finetune.encode_example(run.tokenizer, *pair)
            assert r["id"] == q.id or person not in pair[0] + pair[1]  # the page says so
    return examples.pop(q.id), list(examples.values())


def learn(run, q, mine, others) -> tuple[tuple, tuple, list[float]]:
    """Train on `others`: (loss on `mine`, greedy output) before and after, losses of the steps."""

    def state() -> tuple[float, tuple[str, str]]:
        cap = tasks.get(q.task).greedy_cap
        output = metrics.greedy(run.model, run.tokenizer, [q], run.suffix, cap)[0]
        return finetune.mean_loss(run.model, [mine]), output

    before, losses = state(), []
    optimizer = finetune.make_optimizer(run.model, LR)
    for epoch in range(EPOCHS):
        order = finetune.epoch_order(len(others), 0, epoch)
        for i in range(0, len(order), BATCH):
            batch = [others[j] for j in order[i : i + BATCH]]
            losses.append(finetune.train_step(run.model, optimizer, batch, len(losses) + 1))
    return before, state(), losses


def training(run, q, records) -> list[str]:
    """The training example; self-training on the other questions; what evaluate reads."""
    tokenizer = run.tokenizer
    mine, others = selected_examples(run, q, records)
    before, after, losses = learn(run, q, mine, others)
    per_epoch = len(losses) // EPOCHS

    def show(i: int) -> str:
        return "no loss" if i == finetune.IGNORE else f"{i} {code(tokenizer.decode([i]))}"

    example = f"""
        `prompts.sert_pair`, `finetune.encode_example` (paper: §II-B)

        The selected path becomes `{{path}} So the answer is {{gold}}.`; a closing answer sentence of
        the path's own is taken off before (`prompts.strip_answer_sentence`). Prompt and completion
        are tokenised apart, as in sampling. The target of a place is the next token; a place whose
        target lies in the prompt has no loss (`--loss-on all` gives it one). The last target is
        end-of-text: the student has to learn to stop. The first {len(mine[0]) - SHOWN} of
        {len(mine[0])} places are left out here."""
    learning = f"""
        `finetune.train_step`, `finetune.epoch_order`, `metrics.greedy` (paper: §II-B, §III-A)

        {EPOCHS} epochs over the selected paths of the other {len(others)} questions: {len(losses)}
        steps of {BATCH}, Adam, learning rate {LR}. **This question is held out**, and no training
        text names its person. So the others can teach how to answer, not what."""
    reading = """
        `metrics.grade`, `prompts.extract_answer`, `prompts.extract_lenient` (paper: §III-A)

        Strict: what stands right after the last `the answer is`. Lenient, shown beside it: else the
        first answer word, which in a list of options is its first label. What cannot be read is
        wrong, and never guessed. Fmt is `ok` or the reason why not; Len counts words; Rep is
        1 - distinct words / words."""
    places = ((n, show(mine[0][n]), show(mine[1][n])) for n in range(-SHOWN, 0))
    epochs = (
        (e + 1, f"{sum(losses[e * per_epoch : (e + 1) * per_epoch]) / per_epoch:.3f}")
        for e in range(EPOCHS)
    )
    outputs, scores = [], []
    for name, (loss, (text, finish)) in (("before", before), ("after", after)):
        r = metrics.grade(q, text, finish)
        outputs.append((name, f"{loss:.3f}", code(text)))
        read = r["extracted"] or "-", r["extracted_lenient"] or "-", r["correct"], r["reason"]
        scores.append((name, *read, r["words"], f"{r['rep1']:.3f}"))
    return [
        "## 6. The training example",
        prose(example),
        table("place | input | target", ((len(mine[0]) + n, a, b) for n, a, b in places)),
        f"Mean loss of this example before training: {before[0]:.3f} nats per supervised token.",
        "## 7. Self-training",
        prose(learning),
        table("epoch | mean loss of its steps", epochs),
        table("this question | loss on its example | greedy output", outputs),
        *distillation(run, q),
        "## 9. What evaluate reads",
        prose(reading),
        table("output | strict | lenient | right | Fmt | Len | Rep", scores),
    ]


def distillation(run, q) -> list[str]:
    outputs = distill.program_outputs([q], tasks.get("micro").teacher)
    (record,), _ = rationales.rationale_records([q], outputs, "right", lambda *_: True)
    prompt, completion = prompts.rd_pair(q, record["rationale"])
    _, targets = finetune.encode_example(run.tokenizer, prompt, completion)
    masked = targets.count(finetune.IGNORE)
    about = f"""
        `distill.program_outputs`, `rationales.rationale_records`, `prompts.rd_pair` (paper: §II-C)

        In the micro-world the generator is the teacher; elsewhere a file or an endpoint is. A
        rationale is kept if its own answer is right: read `{record["teacher_answer"]}`, gold
        `{q.answer}`, {"kept" if record["kept"] else record["reason"]}. The sentence `Let's think
        step by step.` belongs to the prompt, so it has no loss: {masked} of {len(targets)} places
        have none. A student trained so is asked with that sentence later; its `sert.json` says
        so."""
    example = block(f"prompt      {prompt!r}\ncompletion  {completion!r}")
    return ["## 8. The teacher's rationale", prose(about), example]


def write_page(path: Path) -> None:
    """The whole page."""
    torch.set_num_threads(1)
    flags = ["--device", "cpu", "--dtype", "fp32", "--out-dir", str(path.parent / "no-such-run")]
    run = sample.prepare(sample.parse_args(flags))
    size, records = run.settings["block_questions"], []
    for i in range(0, N_QUESTIONS, size):
        records += sample.block_records(run, run.questions[i : i + size])
    q = run.questions[FOLLOWED]
    own = [r for r in records if r["id"] == q.id]
    selected = next(r for r in own if r["verdict"] == "selected")
    about = """
        Written by `python docs/example.py`; change the program, not this page. One question of the
        micro-world goes through sampling, filtering, self-training, distillation and evaluation.
        Each step names its functions and the section of the paper. Modules without a folder are in
        `sert_min/`; `sample` and `distill` are the scripts."""
    machine = f"""
        Torch {torch.__version__.split("+")[0]}, {torch.backends.cpu.get_cpu_capability()}. On
        another CPU the last bits differ, and now and then a draw."""
    parts = ["# One question, from prompt to metric", prose(about)]
    parts += question(run, q) + branching(run, q) + drawing(run, q, selected)
    parts += filtering(run, own, selected) + training(run, q, records) + [prose(machine)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".md")
    write_page(out)
    print(f"wrote {out}")

"""One question of the micro-world on its way through the whole method, as a page.

    python docs/example.py              # writes docs/example.md, in about 15 seconds on one core

Every id, log-prob, verdict and answer of the page comes out of the program's own functions while
the page is written; tests/test_example.py writes it again and compares.
"""

import contextlib
import io
import os
import sys
import tempfile
import textwrap
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distill
import sample
from sert_min import filters, finetune, metrics, prompts, rationales, tasks
from sert_min.answers import strip_answer_sentence
from sert_min.decode import prefill
from sert_min.generate import first_rows, sample_paths, stream_of
from sert_min.kernels import reference
from sert_min.micro import program
from sert_min.report import console

BLOCKS, FOLLOWED = 2, 3  # 64 questions; of them this one, which the training leaves out
TRAINING = finetune.TrainSettings(epochs=3)
SHOWN = 33  # places of the training example


# --- Markdown -------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Paragraphs, wrapped."""
    wrap = {"width": 100, "break_long_words": False, "break_on_hyphens": False}
    return "\n\n".join(textwrap.fill(" ".join(p.split()), **wrap) for p in text.split("\n\n"))


def code(text: str, width: int = 200) -> str:
    """Model text as a code span."""
    text = text.replace("\n", "\\n")
    return f"`{text if len(text) <= width else text[: width - 2] + '..'}`"


def block(text: str) -> str:
    return "```text\n" + text.strip("\n") + "\n```"


def table(head: str, rows) -> str:
    """`head` names the columns, separated by |."""
    cells = (" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows)
    rule = "|" + "---|" * (head.count("|") + 1)
    return "\n".join([f"| {head} |", rule, *(f"| {row} |" for row in cells)])


# --- the steps ------------------------------------------------------------------------------------


@torch.inference_mode()
def prompt_and_branches(run, q) -> list[str]:
    text, tokenizer = prompts.question_prompt(q, run.student.suffix), run.tokenizer
    ids = tokenizer.encode(text)
    logits = run.model.logits(prefill(run.model, [ids]).hidden)[:, : tokenizer.n_vocab]
    rows = first_rows(logits, [f"{q.task}/{q.id}"], run.s, tokenizer.eot)[:: run.s.samples]
    first = [(r.branch, r.token_ids[0], code(tokenizer.decode(r.token_ids)), f"{r.logprobs[0]:.3f}")
             for r in rows]  # fmt: skip
    asked = f"""`tasks.load` -> `prompts.question_prompt` -> `tokenizer.Tokenizer.encode` (paper:
        §II-A-1, Fig. 2)

        Question {q.id} has the gold answer `{q.answer}`, which is written {code(q.write())}. The
        options stand in the question's text, as in CommonsenseQA. The prompt ends without a space:
        in GPT-2's byte-level BPE a space belongs to the word after it, so every first token below
        brings its own."""
    branched = """`decode.prefill`, `generate.first_rows` (paper: §II-A-1)

        The prompt runs through the model once. Its keys and values are kept and shared by all 25
        paths. At its end, the five most probable first tokens become five branches. This is where
        the method looks for reasoning: a path that the model would begin with low probability gets
        as many samples as the one that it prefers. Log-probs are natural logarithms, at temperature
        1 over the whole vocabulary."""
    return [
        "## 1. Question, prompt, ids", prose(asked), block(text), f"{len(ids)} ids:",
        block(textwrap.fill(str(ids), 96)), "## 2. Prefill and branching", prose(branched),
        table("branch | id | token | log-prob", first),
    ]  # fmt: skip


@torch.inference_mode()
def drawing(run, q, path) -> list[str]:
    tokenizer, s, ids, logprobs = run.tokenizer, run.s, path["token_ids"], path["logprobs"]
    at = logprobs.index(min(logprobs[1:]), 1)  # the least certain draw
    prompt = tokenizer.encode(prompts.question_prompt(q, run.student.suffix))
    logits = run.model.logits(run.model(torch.tensor([prompt + ids[:at]]))[:, -1])
    logits = logits[:, : tokenizer.n_vocab]
    stream = torch.tensor([stream_of(f"{q.task}/{q.id}", path["branch"], path["sample"])])
    u = reference.uniform(s.seed, stream, torch.tensor([at])).item()
    # The two cuts go by probability, the walk goes by id.
    best, candidates = reference.best_first(logits, s.top_k)
    p = (best - logits.logsumexp(-1, keepdim=True)).exp()[0]
    kept = (p.cumsum(0) - p) / p.sum() < s.top_p
    rows, total, drawn = [], 0.0, None
    for i, p_i, kept_i in sorted(zip(candidates[0].tolist(), p.tolist(), kept.tolist())):
        total += p_i / p[kept].sum().item() if kept_i else 0.0
        here = kept_i and drawn is None and total > u
        drawn = p_i if here else drawn
        assert here == (i == ids[at])  # the token that the path has
        fate = f"**drawn**: the first above {u:.3f}" if here else "kept" if kept_i else "cut"
        cumulative = f"{total:.4f}" if kept_i else "-"
        rows.append((i, code(tokenizer.decode([i])), f"{p_i:.4f}", cumulative, fate))
    tokens = [(n, i, code(tokenizer.decode([i])), f"{lp:.3f}")
              for n, (i, lp) in enumerate(zip(ids, logprobs))]  # fmt: skip
    about = f"""`decode.Decoder.step`, `kernels.head_sample_and_score` (paper: §II-A-1, §III-A)

        This is sample {path["sample"]} of branch {path["branch"]}. Its first token has log-prob
        {logprobs[0]:.3f}; the mean of the others is {sum(logprobs[1:]) / (len(ids) - 1):.3f}.
        Reasoning is latent in this sense: it is rarely begun, and easily continued."""
    draw = f"""The least certain draw is the one at position {at}. Top-k leaves the {s.top_k} most
        probable tokens. Top-p goes through them in the order of their probability and cuts those
        that have at least {s.top_p} of the ten's mass before them. Then the draw walks through the
        kept tokens, now in the order of their ids, and takes the first one whose cumulative
        probability is above a uniform number, here {u:.3f}. The table is in this order; its
        cumulative column counts the kept tokens only, so it ends at 1. The uniform number is a
        function of the seed, the path's name and the position alone, so it is the same in any batch
        and after any restart."""
    score = f"""The recorded log-prob at this token is ln {drawn:.4f} = {logprobs[at]:.3f}. It comes
        from the same pass over the logits as the draw, but from before the cuts: temperature 1, the
        full vocabulary. So a drawn token needs no second forward pass for its log-prob."""
    return [
        "## 3. One path, token by token", prose(about),
        table("position | id | token | log-prob", tokens),
        prose(draw), table("id | token | probability | cumulative | ", rows), prose(score),
    ]  # fmt: skip


def filtering(run, records, path) -> list[str]:
    rows, funnel = [], io.StringIO()
    with contextlib.redirect_stdout(funnel):
        console.print_funnel({"rules": run.limits, "counts": filters.Funnel(records).counts()})
    for r in records:
        facts = r["path_end"] - r["path_start"], r["finish"]
        facts += f"{r['perplexity']:.3f}", f"{r['rep2']:.3f}", r["verdict"]
        rows.append((f"{r['branch']}.{r['sample']}", code(r["text"], 64), *facts))
    about = """`generate.sample_paths`, `filters.verdict` (paper: §II-A-2, Fig. 2)

        Each line gives branch and sample, the path, its number of tokens, how it ended (`eos`: by
        itself), its perplexity, its rep-2 (the share of repeated bigrams) and its verdict, which
        names the first rule that the path breaks. Dropped paths stay in `paths.jsonl` with all of
        this. A short answer with a word that is none of the options is no `pattern:direct`; it is
        left to the length rule."""
    rules = """`filters.RULES`, `filters.select`, `filters.Funnel` (paper: §II-A-2, §III-A)

        Each rule sees what the one before it left. The limits are the micro-world's
        (`world.PRESET`); the paper's are 25 tokens, rep-2 0.2 and perplexity 5. No rule looks at the
        gold answer, so a selected path can be wrong."""
    selected = f"""Of the paths that passed, the one with the lowest rep-2 is selected (ties: lowest
        branch, then lowest sample): {path["branch"]}.{path["sample"]}, {code(path["text"])}. A path
        that says a thing twice has more repeated bigrams."""
    return [
        "## 4. All 25 continuations", prose(about),
        table("path | text | tokens | finish | perplexity | rep-2 | verdict", rows),
        "## 5. What the rules dropped, and the selected path", prose(rules),
        block(funnel.getvalue()), prose(selected),
    ]  # fmt: skip


def training(run, q, records) -> list[str]:
    """The training example; self-training on the other questions; what evaluate reads."""
    by_id, person = {x.id: x for x in run.blocks.questions}, program.parse_question(q).person
    examples = {}
    for r in records:
        text, _ = strip_answer_sentence(r["text"])
        if r["verdict"] == "selected" and text:
            pair = prompts.sert_pair(by_id[r["id"]], text)
            examples[r["id"]] = finetune.encode_example(run.tokenizer, *pair)
            assert r["id"] == q.id or person not in pair[0] + pair[1]  # the page says so
    (ids, targets), outputs, grades = examples.pop(q.id), [], []

    def note(name: str) -> None:
        cap = tasks.get(q.task).greedy_cap
        (output,) = metrics.greedy(run.model, run.tokenizer, [q], run.student.suffix, cap)
        loss = finetune.mean_loss(run.model, [(ids, targets)])
        outputs.append((name, f"{loss:.3f}", code(output[0])))
        r = metrics.grade(q, *output)
        read = r["extracted"] or "-", r["extracted_lenient"] or "-", r["correct"], r["reason"]
        grades.append((name, *read, r["words"], f"{r['rep1']:.3f}"))

    note("before")
    with tempfile.TemporaryDirectory() as folder:
        finetune.fit(run.model, [*examples.values()], [*examples], Path(folder), TRAINING)
    note("after")

    def show(i: int) -> str:
        return "no loss" if i == finetune.IGNORE else f"{i} {code(run.tokenizer.decode([i]))}"

    example = f"""`prompts.sert_pair`, `finetune.encode_example` (paper: §II-B)

        The selected path becomes `{{path}} So the answer is {{gold}}.`, after a closing answer
        sentence of its own is taken off (`answers.strip_answer_sentence`). Prompt and completion are
        tokenised apart, as in sampling. The target of a place is the next token; a place whose
        target lies in the prompt has no loss (`--loss-on all` gives it one). The last target is
        end-of-text, because the student has to learn to stop. The first {len(ids) - SHOWN} of
        {len(ids)} places are left out here."""
    learning = f"""`finetune.fit`, `finetune.train_step`, `metrics.greedy` (paper: §II-B, §III-A)

        Training takes {TRAINING.epochs} epochs over the selected paths of the other {len(examples)}
        questions: {TRAINING.steps(len(examples))} steps of {TRAINING.batch_size} examples with Adam
        at learning rate {TRAINING.lr}. **This question is held out**, and no training text names its
        person. So the others can teach how to answer, not what. The loss is in nats per supervised
        token."""
    reading = """`metrics.grade`, `answers.extract_answer`, `answers.extract_lenient` (paper: §III-A)

        The strict answer stands right after the last `the answer is`. The lenient one, shown beside
        it, is else the last answer statement of another form, or the first answer word of a short
        output, which in a list of options is its first label. An output without a readable answer
        is wrong; nothing is guessed. Fmt is `ok` or the reason why not, Len counts words, and Rep
        is 1 - distinct words / words."""
    places = ((len(ids) + i, show(ids[i]), show(targets[i])) for i in range(-SHOWN, 0))
    return [
        "## 6. The training example", prose(example), table("place | input | target", places),
        "## 7. Self-training", prose(learning),
        table("this question | loss on its example | greedy output", outputs),
        *distillation(run, q),
        "## 9. What evaluate reads", prose(reading),
        table("output | strict | lenient | right | Fmt | Len | Rep", grades),
    ]  # fmt: skip


def distillation(run, q) -> list[str]:
    outputs = distill.program_outputs([q], tasks.get(q.task).teacher)
    (record,), _ = rationales.rationale_records([q], outputs, "right", lambda *_: True)
    prompt, completion = prompts.rd_pair(q, record["rationale"])
    _, targets = finetune.encode_example(run.tokenizer, prompt, completion)
    about = f"""`distill.program_outputs`, `rationales.rationale_records`, `prompts.rd_pair` (paper:
        §II-C)

        In the micro-world a program is the teacher; elsewhere a file or an endpoint is. A rationale
        is kept if its own answer is right: here `{record["teacher_answer"]}` is read, the gold
        answer is `{q.answer}`, and the rationale is {"kept" if record["kept"] else record["reason"]}.
        The sentence `Let's think step by step.` belongs to the prompt, so it has no loss:
        {targets.count(finetune.IGNORE)} of {len(targets)} places have none. A student that was
        trained this way is asked with that sentence later; its `sert.json` says so."""
    example = block(f"prompt      {prompt!r}\ncompletion  {completion!r}")
    return ["## 8. The teacher's rationale", prose(about), example]


def write_page(path: Path) -> None:
    """The whole page."""
    torch.set_num_threads(1)
    flags = ["--device", "cpu", "--dtype", "fp32", "--out-dir", str(path.parent / "no-such-run")]
    run, records = sample.prepare(sample.parse_args(flags)), []
    for questions in map(run.blocks.block, range(BLOCKS)):
        sampled = sample_paths(run.model, run.tokenizer, questions, run.s, run.student.suffix)
        records += filters.path_records(sampled, questions, run.tokenizer, run.limits)
    q = run.blocks.questions[FOLLOWED]
    own = [r for r in records if r["id"] == q.id]
    selected = next(r for r in own if r["verdict"] == "selected")
    about = """Written by `python docs/example.py`; change the program, not this page. One question of
        the micro-world goes through sampling, filtering, self-training, distillation and evaluation.
        Each step names its functions and the section of the paper. The modules are in `sert_min/`;
        `sample` and `distill` are scripts, `world` and `program` are in `sert_min/micro/`."""
    torch_version, kind = torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability()
    machine = f"""Torch {torch_version}, {kind}. On another CPU the last bits differ, and now and then
        a draw."""
    parts = ["# One question, from prompt to metric", prose(about)]
    parts += prompt_and_branches(run, q) + drawing(run, q, selected)
    parts += filtering(run, own, selected) + training(run, q, records) + [prose(machine)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".md")
    write_page(out)
    print(f"wrote {out}")

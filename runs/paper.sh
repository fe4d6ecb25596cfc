#!/usr/bin/env bash
# The paper's matrix: 2 tasks x 3 students x 4 methods, then Table II; with a judge also Figures 1,
# 3, 4. One line per finished cell. Finished cells are skipped; repeat the command to continue.
#
#   bash runs/paper.sh --dry-run                         # the matrix with tokens and time
#   TASKS=strategy_qa MODELS=gpt2 bash runs/paper.sh     # a part of it
#   METHODS="finetune sert" LIMIT=100 bash runs/paper.sh
#
# TASKS, MODELS, METHODS   what to run (MODELS: names, hub ids or folders)
# SEED, LIMIT, DATA_DIR    as the scripts' flags; LIMIT holds for every stage
# TEACHER_FILE_STRATEGY_QA, TEACHER_FILE_COMMONSENSE_QA   rationale files (or `davinci`), or else
# TEACHER_FLAGS            distill.py's flags for an endpoint: --teacher-model NAME --base-url URL
# JUDGE_FLAGS              evaluate.py's flags for an endpoint: --judge-model NAME --base-url URL
# SAMPLE_FLAGS, TRAIN_FLAGS, EVALUATE_FLAGS    more flags of single stages
# FIGURE_QUESTIONS         test questions of Figures 1 and 4 (default 100)
# PYTHON                   the interpreter (default: python)
# shellcheck disable=SC2086,SC2206  # flags are words
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

tasks=${TASKS:-strategy_qa commonsense_qa}
models=${MODELS:-gpt2 gpt2-medium gpt2-large}
methods=${METHODS:-finetune sert sert-rd rd}
seed=${SEED:-0}
judge=(${JUDGE_FLAGS:-}) data=(${DATA_DIR:+--data-dir "$DATA_DIR"}) limit=(${LIMIT:+--limit "$LIMIT"})
[[ -n "${TEACHER_FLAGS:-}" ]] || : "${TEACHER_FILE_STRATEGY_QA:=davinci}" # the paper's own teacher
failed=0

if [[ "${1:-}" == --dry-run ]]; then
  run bench/cost.py --matrix --tasks $tasks --models $models --methods $methods "${limit[@]}"
  exit
elif [[ $# -gt 0 ]]; then
  echo "error: paper.sh takes --dry-run only; everything else is a variable, see its head" >&2
  exit 2
fi

label_of() { # label_of MODEL: its part of output folders
  PYTHONPATH=$here "$python" - "$1" <<'PY'
import sys
from sert_min.io.errors import run_script
from sert_min.io.hub import find_model, model_label

run_script(lambda name: print(model_label(name, find_model(name))), sys.argv[1])
PY
}

result() { # result LOG: the accuracy that evaluate.py printed last
  awk '/ questions$/ { n = $(NF - 1) }
    /^  Acc, strict/ { acc = "    Acc " $3 " % (" $7 " to " $9 "), " n " questions" }
    END { print acc }' "$1"
}

train() { # train METHOD
  local flags=(--task "$task" "${data[@]}" "${limit[@]}" --seed "$seed") teacher from=$model
  local file=TEACHER_FILE_${task^^} to=(--out-dir "$root/$1/seed$seed" ${TRAIN_FLAGS:-})
  case $1 in
    sert)
      run sample.py "${flags[@]}" --model "$model" ${SAMPLE_FLAGS:-} &&
        run train.py "${flags[@]}" --model "$model" "${to[@]}" \
          --paths "$root/paths-train/seed$seed/selected.jsonl" ;;
    rd | sert-rd)
      if [[ $1 == sert-rd ]]; then
        from=$root/sert/seed$seed
        train sert || return 1
      fi
      teacher=(${TEACHER_FLAGS:-})
      [[ -z "${!file:-}" ]] || teacher=(--teacher-file "${!file}")
      run distill.py "${flags[@]}" --model "$from" "${teacher[@]}" "${to[@]}" ;;
    *) run train.py --method "$1" "${flags[@]}" --model "$model" "${to[@]}" ;;
  esac
}

cell() { # cell METHOD ..: train it and evaluate it
  local judged=("${judge[@]}")
  [[ $1 != finetune ]] || judged=() # it only states answers
  train "$1" && run evaluate.py --task "$task" "${data[@]}" "${limit[@]}" \
    --model "$root/$1/seed$seed" ${EVALUATE_FLAGS:-} "${judged[@]}"
}

figures() { # the samples of Figures 1 and 4, judged
  local sert=$root/sert/seed$seed how=(--split test --limit "${FIGURE_QUESTIONS:-100}" --seed "$seed")
  local paths=("$root/paths-test/seed$seed" "$root/paths-raw-test/seed$seed")
  how+=(--task "$task" "${data[@]}" --no-early-reject ${SAMPLE_FLAGS:-})
  run sample.py "${how[@]}" --model "$model" &&
    run sample.py "${how[@]}" --model "$model" --raw || return 1
  if [[ -d $sert/last ]]; then
    run sample.py "${how[@]}" --model "$sert" --raw --out-dir "$sert/paths-raw-test" || return 1
    paths+=("$sert/paths-raw-test")
  fi
  run evaluate.py --task "$task" --paths "${paths[@]}" "${judge[@]}"
}

for model in $models; do
  label=$(label_of "$model")
  for task in $tasks; do
    root=out/$task/$label file=TEACHER_FILE_${task^^}
    # Everything that a cell depends on: with other flags it is not done.
    given="$model ${data[*]} ${limit[*]} | ${SAMPLE_FLAGS:-} | ${TRAIN_FLAGS:-} | ${EVALUATE_FLAGS:-}"
    given+=" | ${judge[*]} | ${!file:-} ${TEACHER_FLAGS:-} ${FIGURE_QUESTIONS:-}"
    for method in $methods; do
      name=$(printf '%-16s %-16s %s' "$task" "$label" "$method")
      step "$root/logs/seed$seed" "$name" cell "$method" "$given" || failed=1
    done
    [[ ${#judge[@]} -eq 0 ]] ||
      step "$root/logs/seed$seed" "$task $label samples" figures "$given" || failed=1
  done
done
echo
run evaluate.py --table out
for task in $tasks; do
  [[ ${#judge[@]} -eq 0 ]] || run evaluate.py --figures "out/$task"
done
exit $failed

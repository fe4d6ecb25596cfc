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
# TEACHER_MODEL, TEACHER_FLAGS   an endpoint's model and distill.py's flags for it
# JUDGE_MODEL, JUDGE_FLAGS       an endpoint's model and evaluate.py's flags for it
# SAMPLE_FLAGS, TRAIN_FLAGS, DISTILL_FLAGS, EVALUATE_FLAGS    more flags of single stages
# PYTHON                   the interpreter (default: python)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
tasks=${TASKS:-strategy_qa commonsense_qa}
models=${MODELS:-gpt2 gpt2-medium gpt2-large}
methods=${METHODS:-finetune sert sert-rd rd}
seed=${SEED:-0}
strategy_qa_teacher=${TEACHER_FILE_STRATEGY_QA:-}
commonsense_qa_teacher=${TEACHER_FILE_COMMONSENSE_QA:-}
if [[ -z "$strategy_qa_teacher" && -z "${TEACHER_MODEL:-}" ]]; then
  strategy_qa_teacher=davinci # the paper's own teacher, a public log
fi
# shellcheck disable=SC2206  # flags are words
more_sample=(${SAMPLE_FLAGS:-}) more_train=(${TRAIN_FLAGS:-}) more_distill=(${DISTILL_FLAGS:-})
# shellcheck disable=SC2206
more_evaluate=(${EVALUATE_FLAGS:-}) judge=(${JUDGE_FLAGS:-}) common=()
[[ -n "${DATA_DIR:-}" ]] && common+=(--data-dir "$DATA_DIR")
[[ -n "${LIMIT:-}" ]] && common+=(--limit "$LIMIT")
[[ -n "${JUDGE_MODEL:-}" ]] && judge+=(--judge-model "$JUDGE_MODEL")

if [[ "${1:-}" == --dry-run ]]; then
  exec "$python" "$here/bench/cost.py" --matrix --tasks $tasks --models $models \
    --methods $methods ${LIMIT:+--limit "$LIMIT"} "${@:2}"
elif [[ $# -gt 0 ]]; then
  echo "error: paper.sh takes --dry-run only; everything else is a variable, see its head" >&2
  exit 2
fi

for task in $tasks; do
  if [[ $task != strategy_qa && $task != commonsense_qa ]]; then
    echo "error: TASKS knows strategy_qa and commonsense_qa, not $task" >&2
    exit 2
  fi
done
failed=0

run() { # run LOG SCRIPT FLAGS..: into the cell's log
  local log=$1 script=$2
  shift 2
  "$python" "$here/$script" "$@" >>"$log" 2>&1
}

label_of() { # the MODEL part of output folders
  "$python" - "$here" "$1" <<'PY'
import sys

sys.path.insert(0, sys.argv[1])
from sert_min.io.errors import run_script
from sert_min.io.hub import find_model, model_label

run_script(lambda name: print(model_label(name, find_model(name))), sys.argv[2])
PY
}

teacher_flags() { # of a task; fails where there is none
  local file="$1_teacher"
  if [[ -n "${!file}" ]]; then
    printf '%s\n' --teacher-file "${!file}"
  elif [[ -n "${TEACHER_MODEL:-}" ]]; then
    printf '%s\n' --teacher-model "$TEACHER_MODEL"
    # shellcheck disable=SC2086
    [[ -z "${TEACHER_FLAGS:-}" ]] || printf '%s\n' ${TEACHER_FLAGS}
  else
    return 1
  fi
}

train_cell() { # TASK MODEL METHOD OUT LOG
  local task=$1 model=$2 method=$3 out=$4 log=$5 root=${4%/*/*}
  local task_flags=(--task "$task" "${common[@]}" --seed "$seed") teacher
  case $method in
    finetune)
      run "$log" train.py --method finetune "${task_flags[@]}" --model "$model" --out-dir "$out" \
        "${more_train[@]}" ;;
    sert)
      run "$log" sample.py "${task_flags[@]}" --model "$model" "${more_sample[@]}" &&
        run "$log" train.py --method sert "${task_flags[@]}" --model "$model" --out-dir "$out" \
          --paths "$root/paths-train/seed$seed/selected.jsonl" "${more_train[@]}" ;;
    rd | sert-rd)
      mapfile -t teacher < <(teacher_flags "$task")
      if [[ ${#teacher[@]} -eq 0 ]]; then
        echo "error: set TEACHER_FILE_${task^^} or TEACHER_MODEL" >>"$log"
        return 1
      fi
      if [[ $method == sert-rd ]]; then
        train_cell "$task" "$model" sert "$root/sert/seed$seed" "$log" || return 1
        model=$root/sert/seed$seed
      fi
      run "$log" distill.py "${task_flags[@]}" --model "$model" --out-dir "$out" "${teacher[@]}" \
        "${more_train[@]}" "${more_distill[@]}" ;;
    *)
      echo "error: METHODS knows finetune, sert, sert-rd and rd, not $method" >>"$log"
      return 1 ;;
  esac
}

accuracy() { # of a metrics.json
  "$python" - "$1" <<'PY'
import json
import sys

m = json.load(open(sys.argv[1]))
acc, low, high = (100 * x for x in m["acc"])
print(f"Acc {acc:.2f} % ({low:.1f} to {high:.1f}), {m['n']:,} questions")
PY
}

cell() { # TASK MODEL LABEL METHOD
  local task=$1 model=$2 label=$3 method=$4 start=$SECONDS
  local out=out/$task/$label/$method/seed$seed name flags teacher="${1}_teacher"
  name=$(printf '%-16s %-16s %-9s' "$task" "$label" "$method")
  # Everything that a cell depends on: with other flags it is not done.
  flags="$model ${common[*]} | ${more_sample[*]} | ${more_train[*]} | ${more_distill[*]} |"
  flags+=" ${more_evaluate[*]} | ${judge[*]} | ${!teacher} ${TEACHER_MODEL:-} ${TEACHER_FLAGS:-}"
  if [[ -f "$out/paper.done" && "$(<"$out/paper.done")" == "$flags" ]]; then
    echo "$name done before  $(accuracy "$out/metrics.json")"
    return
  fi
  mkdir -p "$out"
  local log=$out/paper.log judged=("${judge[@]}")
  [[ $method != finetune ]] || judged=() # it only states answers
  echo "--- $(date -u '+%F %T') $name" >>"$log"
  if train_cell "$task" "$model" "$method" "$out" "$log" &&
    run "$log" evaluate.py --task "$task" "${common[@]}" --model "$out" "${more_evaluate[@]}" \
      "${judged[@]}"; then
    printf '%s' "$flags" >"$out/paper.done"
    printf '%s %7d s    %s\n' "$name" $((SECONDS - start)) "$(accuracy "$out/metrics.json")"
  else
    printf '%s failed: %s\n' "$name" "$(tail -n 5 "$log" | grep -a 'error:' || tail -n 1 "$log")"
    failed=1
  fi
}

figures() { # TASK MODEL LABEL: the samples of Figures 1 and 4, judged
  local task=$1 model=$2 label=$3 start=$SECONDS root=out/$1/$3 log=out/$1/$3/figures.log
  local flags=(--task "$task" --split test --limit "${FIGURE_QUESTIONS:-100}" --seed "$seed")
  flags+=(--no-early-reject "${more_sample[@]}")
  [[ -n "${DATA_DIR:-}" ]] && flags+=(--data-dir "$DATA_DIR")
  local paths=("$root/paths-test/seed$seed" "$root/paths-raw-test/seed$seed")
  local sert=$root/sert/seed$seed
  mkdir -p "$root"
  if ! { run "$log" sample.py "${flags[@]}" --model "$model" &&
    run "$log" sample.py "${flags[@]}" --model "$model" --raw; }; then
    echo "$task $label figures failed: $(tail -n 1 "$log")"
    failed=1
    return
  fi
  if [[ -d $sert/last ]]; then
    run "$log" sample.py "${flags[@]}" --model "$sert" --raw --out-dir "$sert/paths-raw-test"
    paths+=("$sert/paths-raw-test")
  fi
  if run "$log" evaluate.py --task "$task" --paths "${paths[@]}" "${judge[@]}"; then
    printf '%-16s %-16s %-9s %7d s\n' "$task" "$label" samples $((SECONDS - start))
  else
    echo "$task $label judge failed: $(tail -n 1 "$log")"
    failed=1
  fi
}

for model in $models; do
  label=$(label_of "$model")
  for task in $tasks; do
    for method in $methods; do
      cell "$task" "$model" "$label" "$method"
    done
    [[ -z "${JUDGE_MODEL:-}" ]] || figures "$task" "$model" "$label"
  done
done
echo
"$python" "$here/evaluate.py" --table out
for task in $tasks; do
  [[ -z "${JUDGE_MODEL:-}" ]] || "$python" "$here/evaluate.py" --figures "out/$task"
done
exit $failed

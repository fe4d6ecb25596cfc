#!/usr/bin/env bash
# The whole method on the embedded micro-world: stages 1 to 3, Table II, Figures 1, 3, 4.
# Minutes on a laptop, no network. Repeat the command to continue after an interruption.
#
#   bash runs/micro.sh              results under out/micro/micro, logs under out/micro/logs
#   SEED=1 bash runs/micro.sh       another seed; the table averages the seeds that are there
#   FIGURE_QUESTIONS=20 ..          fewer test questions in Figures 1 and 4 (default 100)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}
seed=${SEED:-0}
questions=${FIGURE_QUESTIONS:-100}
out=out/micro/micro
logs=out/micro/logs
mkdir -p "$logs"

step() { # step NAME SCRIPT FLAGS..: run it into a log; one line when it is done
  local name=$1 script=$2 start=$SECONDS log
  shift 2
  log="$logs/$(tr -c 'A-Za-z0-9\n' '-' <<<"$name").log"
  if ! "$python" "$here/$script" "$@" >"$log" 2>&1; then
    printf '%-46s failed; the end of %s:\n' "$name" "$log"
    tail -n 5 "$log"
    exit 1
  fi
  printf '%-46s %4d s\n' "$name" $((SECONDS - start))
}

test_paths=(--split test --limit "$questions")
sert=$out/sert/seed$seed
step "1 sample latent paths" sample.py --seed "$seed"
step "2 train SERT on the selected paths" train.py --seed "$seed" \
  --paths "$out/paths-train/seed$seed/selected.jsonl"
step "2 train Finetune on the labels" train.py --method finetune --seed "$seed"
step "3 distil into SERT (SERT+RD)" distill.py --model "$sert" --seed "$seed"
step "3 distil into the raw student (RD)" distill.py --model micro --seed "$seed"
step "4 evaluate all" evaluate.py --by likelihood
step "5 sample test questions, branched" sample.py "${test_paths[@]}" --seed "$seed"
step "5 sample test questions, plain" sample.py "${test_paths[@]}" --seed "$seed" --raw
step "5 sample test questions, plain, SERT" sample.py "${test_paths[@]}" --seed "$seed" --raw \
  --model "$sert" --out-dir "$sert/paths-raw-test"
step "6 judge the sampled paths" evaluate.py --limit "$questions" --paths \
  "$out/paths-test/seed$seed" "$out/paths-raw-test/seed$seed" "$sert/paths-raw-test"
step "7 figures" evaluate.py --figures "$out"
step "7 table" evaluate.py --table "$out"
echo
cat "$out/table.txt"
echo "figures and their numbers: $out/figures"

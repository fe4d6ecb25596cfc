#!/usr/bin/env bash
# The whole method on the embedded micro-world: stages 1 to 3, Table II, Figures 1, 3, 4.
# Minutes on a laptop, no network. Repeat the command to continue after an interruption.
#
#   bash runs/micro.sh              results under out/micro/micro, logs under out/micro/logs
#   SEED=1 bash runs/micro.sh       another seed; the table averages the seeds that are there
#   FIGURE_QUESTIONS=20 ..          fewer test questions in Figures 1 and 4 (default 100)
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

seed=${SEED:-0}
questions=${FIGURE_QUESTIONS:-100}
out=out/micro/micro
sert=$out/sert/seed$seed
test_paths=(sample.py --split test --limit "$questions" --seed "$seed")
rm -f out/micro/logs/*.done # each step runs again: what a script has done costs it no time

script() { # script NAME SCRIPT FLAGS..
  step out/micro/logs "$1" run "${@:2}"
}

script "1 sample latent paths" sample.py --seed "$seed"
script "2 train SERT on the selected paths" train.py --seed "$seed" \
  --paths "$out/paths-train/seed$seed/selected.jsonl"
script "2 train Finetune on the labels" train.py --method finetune --seed "$seed"
script "3 distil into SERT (SERT+RD)" distill.py --model "$sert" --seed "$seed"
script "3 distil into the raw student (RD)" distill.py --model micro --seed "$seed"
script "4 evaluate all" evaluate.py --by likelihood
script "5 sample test questions, branched" "${test_paths[@]}"
script "5 sample test questions, plain" "${test_paths[@]}" --raw
script "5 sample test questions, plain, SERT" "${test_paths[@]}" --raw \
  --model "$sert" --out-dir "$sert/paths-raw-test"
script "6 judge the sampled paths" evaluate.py --limit "$questions" --paths \
  "$out/paths-test/seed$seed" "$out/paths-raw-test/seed$seed" "$sert/paths-raw-test"
script "7 figures" evaluate.py --figures "$out"
script "7 table" evaluate.py --table "$out"
echo
cat "$out/table.txt"
echo "figures and their numbers: $out/figures"

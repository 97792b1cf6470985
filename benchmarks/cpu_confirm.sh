#!/usr/bin/env bash
# Two studies of cpu_studies.sh again, as long, with seeds that were not used there: eight of `scaling`, whose
# intervals over three left the title's claim open, and six of `baselines`. About an hour of two cores.
#
#   bash benchmarks/cpu_confirm.sh TRAIN TEST OUT
set -eu
here=$(cd "$(dirname "$0")" && pwd)
train=$1 test=$2 out=$3
again() {
  python -m quarterview study "$1" --data "$train" --train "$train" --test "$test" \
    --base "$here/cpu_studies.yaml" --proj-hidden-dim 256 --codebook-size 128 --tokenizer-width 32 \
    --labels 2000 --tune-steps 100 --seed 3 --jobs 2 "${@:2}"
}
again "$here/cpu_scaling.yaml" --seeds 8 --budget 57472images --out "$out/scaling-again"
again baselines --seeds 6 --budget 45632images --measures finetune linear --out "$out/baselines-again"

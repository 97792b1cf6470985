#!/usr/bin/env bash
# Features without a network beside random weights, from few labels and from five times as many.
#
#   bash benchmarks/cpu_plain.sh TRAIN TEST OUT
set -eu
here=$(cd "$(dirname "$0")" && pwd)
train=$1 test=$2 out=$3
for labels in 2000 10000; do
  python -m quarterview study "$here/cpu_plain.yaml" --data "$train" --train "$train" --test "$test" \
    --base "$here/cpu_studies.yaml" --labels "$labels" --seed 9 --seeds 6 --budget 64images --jobs 2 \
    --out "$out/plain-$labels"
done

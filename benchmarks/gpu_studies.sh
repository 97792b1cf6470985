#!/usr/bin/env bash
# The studies on a GPU, in pieces: each call goes on where the last one stopped.
#
#   bash benchmarks/gpu_studies.sh cifar10 studies [MINUTES]
#
# cifar10 holds train.parquet and test.parquet; MINUTES is the length of a piece, 8 by default.
# ViT-tiny/4, decoder 128x2, 100 epochs an arm, three seeds. Exit code 75: call it again.
set -u
data=$1 out=$2 end=$((SECONDS + ${3:-8} * 60))
for study in baselines table1 mask-ratio schedule partial; do
  left=$((end - SECONDS))
  [ "$left" -gt 30 ] || exit 75
  timeout --signal=TERM --kill-after=40 "$left" python -m quarterview study "$study" \
    --data "$data/train.parquet" --train "$data/train.parquet" --test "$data/test.parquet" \
    --base cifar --batch-size 512 --budget 5e6images --seeds 3 --labels 10000 --tune-steps 2000 \
    --out "$out/$study"
  code=$?
  [ "$code" -ne 124 ] && [ "$code" -ne 75 ] || exit 75
  [ "$code" -eq 0 ] || exit "$code"
done

#!/usr/bin/env bash
# Eight studies on CIFAR-10 with two cores, in about 90 minutes.
# Whatever is done is passed over; the same command goes on where it was stopped.
#
#   bash benchmarks/cpu_studies.sh TRAIN TEST OUT
#
# TRAIN and TEST are anything that --data takes; packed (quarterview pack --encoding raw) they are read fastest.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
train=$1 test=$2 out=$3
for planned in baselines:22m table1:25m mask-ratio:7m schedule:6m partial:7m visible:5m scaling:8m slow:14m; do
  name=${planned%%:*}
  study=$name
  [ ! -f "$here/cpu_$name.yaml" ] || study=$here/cpu_$name.yaml
  echo "== $name: $(date -u +%H:%M:%S)"
  python -m quarterview study "$study" --data "$train" --train "$train" --test "$test" \
    --base "$here/cpu_studies.yaml" --proj-hidden-dim 256 --codebook-size 128 --tokenizer-width 32 \
    --labels 2000 --tune-steps 100 --seeds 3 --jobs 2 --budget "${planned##*:}" --out "$out/$name"
done

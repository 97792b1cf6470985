#!/usr/bin/env bash
# Speed on one GPU beside the peers, in stages that each end within nine minutes.
#
#   benchmarks/gpu_speed.sh STAGE... OUT
#
# base, large, huge: a training step at 224 pixels in bf16, eager and compiled, against every peer that
#   is installed; tokens: table 2 of the paper; bench: `quarterview bench` of ViT-L. Needs an environment
#   with torch, timm, transformers and, for their rows, lightly and stable-pretraining. Written for one
#   H200 and never run: none could be had.
set -euo pipefail
out=${*: -1}
mkdir -p "$out"
here=$(dirname "$0")
python=${PYTHON:-python}

peers() {
  for name in transformers lightly stable-pretraining; do
    "$python" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null && printf '%s ' "$name"
  done
  true
}

step() { # name, model, batch
  # shellcheck disable=SC2046
  "$python" "$here/train_step.py" --model "$2" --batch "$3" --device cuda --rounds 5 --steps 5 \
    --peers $(peers) --out "$out/train_step_$1.json"
}

for stage in "${@:1:$#-1}"; do
  case $stage in
    base) step base mae_vit_base_patch16 256 ;;
    large) step large mae_vit_large_patch16 128 ;;
    huge) step huge mae_vit_huge_patch14 64 ;;
    tokens) "$python" "$here/mask_tokens.py" --device cuda --batch 128 --tiny-batch 1024 --rounds 10 \
      --out "$out/mask_tokens.json" ;;
    bench) "$python" -m quarterview bench --model mae_vit_large_patch16 --batch-size 128 --compile \
      --json "$out/bench_large.json" ;;
    *) echo "unknown stage $stage; accepted: base large huge tokens bench" >&2; exit 2 ;;
  esac
done

#!/usr/bin/env bash
# CIFAR-10 on one GPU, in stages of less than nine minutes each: what docs/results/cifar10_finetune.md
# still lacks. Each stage goes on where it was when it is called again.
#
#   benchmarks/gpu_cifar.sh check|pretrain|probe|tune|scratch|labels|curve  FOLDER_WITH_PARQUET  OUT
#
# SECONDS_A_STAGE (500), PRETRAIN_EPOCHS (800), TUNE_EPOCHS (100), SEEDS ("0 1 2") and MORE (further flags
# of every command) may be set. Not yet run on a GPU.
set -euo pipefail

stage=$1 data=$2 out=$3
limit=${SECONDS_A_STAGE:-500}
sets=(--train "$data/train.parquet" --test "$data/test.parquet")
qv() {  # 75 is stopped after saving, and 124 what `timeout` makes of it: both go on next time
  local code=0
  timeout --signal=TERM "$limit" python -m quarterview "$@" ${MORE:-} || code=$?
  [[ $code == 0 || $code == 75 || $code == 124 ]]
}
tune=(--recipe small --batch-size 512 --lr 1e-3 --mixup 0.8 --cutmix 1 --epochs "${TUNE_EPOCHS:-100}" --warmup-epochs 5)
fresh=(scratch --model mae_vit_tiny_patch4 --image-size 32 --layer-decay 1)

case $stage in
  check)    python -c "import torch, quarterview; print(torch.__version__, torch.cuda.get_device_name(0))"
            qv pretrain --recipe cifar --data "$data/train.parquet" --out "$out/check" --steps 50 --batch-size 1024 ;;
  pretrain) qv pretrain --recipe cifar --data "$data/train.parquet" --out "$out/mae" --batch-size 1024 \
              --epochs "${PRETRAIN_EPOCHS:-800}" --checkpoint-minutes 2 ;;
  probe)    qv doctor "$out/mae" || true
            qv knn "$out/mae" "${sets[@]}" --k 1 5 20 200
            qv linear "$out/mae" "${sets[@]}" --labels 10000
            qv linear "$out/mae" "${sets[@]}" --protocol paper ;;
  tune)     for seed in ${SEEDS:-0 1 2}; do qv finetune "$out/mae" "${tune[@]}" "${sets[@]}" --seed "$seed" --out "$out/tuned-$seed"; done ;;
  scratch)  for seed in ${SEEDS:-0 1 2}; do qv finetune "${fresh[@]}" "${tune[@]}" "${sets[@]}" --seed "$seed" --out "$out/scratch-$seed"; done ;;
  labels)   for seed in ${SEEDS:-0 1 2}; do for labels in 500 5000; do
              qv finetune "$out/mae" "${tune[@]}" "${sets[@]}" --labels $labels --seed "$seed" --out "$out/tuned-$labels-$seed"
              qv finetune "${fresh[@]}" "${tune[@]}" "${sets[@]}" --labels $labels --seed "$seed" --out "$out/scratch-$labels-$seed"
            done; done ;;
  curve)    qv finetune "$out/mae" "${tune[@]}" "${sets[@]}" --blocks 0 0.5 1 2 4 8 all --out "$out/curve" ;;
  *)        echo "unknown stage $stage" >&2; exit 2 ;;
esac

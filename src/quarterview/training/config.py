"""Configuration of training: run folder, schedule, hardware and optimizer."""

import math
from typing import Annotated, Literal

from quarterview.config import (
    FIRST,
    MAY_CHANGE,
    PATH,
    RESEARCH,
    Ge,
    Gt,
    Le,
    Lt,
    Text,
    part,
)

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["bf16", "fp32"]


@part
class RunConfig:
    """Run."""

    out: Annotated[Text, FIRST, PATH, MAY_CHANGE] = ""
    """Required: the run's folder, created if missing."""
    log_every: Annotated[int, Ge(1), MAY_CHANGE] = 20
    """Updates between rows in metrics.jsonl."""
    eval_every: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Updates between evaluations: validation loss and panel, or test accuracy of fine-tuning. By default 20
    evaluations a run, and in fine-tuning one after the last update."""
    checkpoint_every: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Updates between checkpoints; by default --checkpoint-minutes decides."""
    checkpoint_minutes: Annotated[float, Gt(0), Le(1e9), MAY_CHANGE] = 10.0
    """Minutes between checkpoints if --checkpoint-every is not given."""
    keep_checkpoints: Annotated[int, Ge(1), MAY_CHANGE] = 2
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Updates between checkpoints that are never deleted, written in addition to the others."""

    def eval_interval(self, total_steps: int) -> int:
        """Return the number of updates between evaluations of a run of `total_steps` updates."""
        return self.eval_every or max(self.log_every, total_steps // 20)


@part
class ResumeConfig:
    """Resuming."""

    resume: Annotated[Text, PATH, MAY_CHANGE] = "auto"
    """auto resumes from the newest checkpoint in --out if there is one; never does not resume; a path names
    the run or the checkpoint to resume from."""


@part
class LoopConfig:
    """Schedule."""

    epochs: Annotated[float, Gt(0), Le(1e9), FIRST] = 800
    """Passes over the training images. The number of updates is ceil(epochs × images / batch size)."""
    steps: Annotated[int | None, Ge(1)] = None
    """Number of updates, instead of --epochs."""
    batch_size: Annotated[int, Ge(1), FIRST] = 256
    """Images per update, over all ranks and all --accum-iter parts."""
    accum_iter: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """Number of parts that a batch is split into to save memory. The gradient is that of the whole batch."""
    seed: int = 0
    """Seed of all random draws."""

    def total_steps(self, images: int) -> int:
        """Return the number of updates of a run over a training set of `images` images."""
        return self.steps or math.ceil(self.epochs * images / self.batch_size)


@part
class ComputeConfig:
    """Hardware."""

    device: Annotated[Device, FIRST, MAY_CHANGE] = "auto"
    """Device to use; auto is a CUDA GPU if there is one, else the CPU. mps is untested."""
    precision: Precision = "bf16"
    """bf16 (autocast) or fp32."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """Compile the model with torch.compile: a slower start, faster steps. Needs a C++ compiler on CPU."""
    grad_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Recompute each block's activations in the backward pass: less memory, about a third more computation,
    the same result."""
    deterministic: Annotated[bool, MAY_CHANGE] = False
    """Use deterministic kernels only, so that reruns on one GPU are bit-identical. Reruns on CPU always
    are."""
    parallel: Annotated[Literal["auto", "ddp", "fsdp"], MAY_CHANGE] = "auto"
    """Parallelism over several ranks: ddp replicates the model; fsdp shards weights and optimizer state; auto
    shards if weights, gradients and optimizer state need more than a quarter of a GPU's memory."""
    ranks_per_copy: Annotated[int | None, Ge(1), MAY_CHANGE, RESEARCH] = None
    """With fsdp, number of ranks that one replica of the model is sharded over; by default those of one
    machine."""


@part
class OptimConfig:
    """Optimizer. The defaults are the paper's (table 8)."""

    blr: Annotated[float, Gt(0)] = 1.5e-4
    """Base learning rate; the learning rate is blr × batch size / 256."""
    lr: Annotated[float | None, Gt(0)] = None
    """Peak learning rate, instead of --blr."""
    warmup_epochs: Annotated[float | None, Ge(0)] = None
    """Epochs of linear warm-up from 0; by default 5% of the run, the paper's 40 of 800 epochs."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Weight decay of weight matrices, the cls and the mask token. Biases and norms are not decayed."""
    clip_grad: Annotated[float | None, Gt(0)] = None
    """Maximum norm of the gradient; by default it is not clipped."""
    ema: Annotated[float | None, Gt(0), Lt(1)] = None
    """Decay of an exponential moving average (EMA) of the weights, such as 0.9999, saved beside them."""

    def peak_lr(self, batch_size: int) -> float:
        """Return the peak learning rate for a batch size over all ranks."""
        return self.lr if self.lr is not None else self.blr * batch_size / 256


@part
class LayerDecayConfig:
    """Optimizer of fine-tuning."""

    layer_decay: Annotated[float, Gt(0), Le(1)] = 0.75
    """Ratio of each layer's learning rate to that of the layer above it."""
    min_lr: Annotated[float, Ge(0)] = 1e-6
    """Learning rate at the end of the cosine schedule."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """AdamW's beta2; the recipes scratch_* use 0.95."""

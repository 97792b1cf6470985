"""Where a run lives, how long it trains, on what, and how weights follow gradients."""

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
    """Required: the run's folder; made if it is not there."""
    log_every: Annotated[int, Ge(1), MAY_CHANGE] = 20
    """Updates between rows of metrics."""
    eval_every: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Updates between evaluations (validation and panel, or the test images of fine-tuning); by default a
    twentieth of the run, and in fine-tuning after the last update alone."""
    checkpoint_every: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Updates between checkpoints; by default the clock decides."""
    checkpoint_minutes: Annotated[float, Gt(0), Le(1e9), MAY_CHANGE] = 10.0
    """Minutes between checkpoints where --checkpoint-every is not given."""
    keep_checkpoints: Annotated[int, Ge(1), MAY_CHANGE] = 2
    """How many of the newest checkpoints are kept."""
    keep_every: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Also write a checkpoint after every so many updates, and keep those for good."""

    def evaluation_every(self, total_steps: int) -> int:
        """Updates between evaluations in a run of so many."""
        return self.eval_every or max(self.log_every, total_steps // 20)


@part
class ResumeConfig:
    """Resuming."""

    resume: Annotated[Text, PATH, MAY_CHANGE] = "auto"
    """auto goes on from the run's newest checkpoint if there is one, never refuses to, and a path names the
    run or the checkpoint to go on from."""


@part
class LoopConfig:
    """Schedule."""

    epochs: Annotated[float, Gt(0), Le(1e9), FIRST] = 800
    """Passes over the training images; the updates are ceil(epochs × images / batch size)."""
    steps: Annotated[int | None, Ge(1)] = None
    """Updates, instead of epochs."""
    batch_size: Annotated[int, Ge(1), FIRST] = 256
    """Images per update, over all ranks and accumulated parts."""
    accum_iter: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """Parts that a batch is cut into to save memory; gradients are those of the whole batch."""
    seed: int = 0
    """Seed of every random draw."""

    def total_steps(self, images: int) -> int:
        """Updates of the whole run over a training set of so many images."""
        return self.steps or math.ceil(self.epochs * images / self.batch_size)


@part
class ComputeConfig:
    """Hardware."""

    device: Annotated[Device, FIRST, MAY_CHANGE] = "auto"
    """Where to train; auto takes a CUDA GPU where there is one. mps is untested."""
    precision: Precision = "bf16"
    """bf16 autocast, or float32 throughout."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """Compile the model: slow to start, faster after; needs a C++ compiler on CPU."""
    grad_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Keep the input of each block alone for the backward pass and compute the rest again: less memory for
    about a third more work. Nothing else changes."""
    deterministic: Annotated[bool, MAY_CHANGE] = False
    """Use deterministic kernels only; bit-identical reruns on one GPU, too. CPU runs always are."""
    parallel: Annotated[Literal["auto", "ddp", "fsdp"], MAY_CHANGE] = "auto"
    """What each of several ranks holds: the whole model (ddp), a part of its weights and of the optimizer's
    state (fsdp), or a part where the whole would take more than a quarter of a GPU (auto)."""
    ranks_per_copy: Annotated[int | None, Ge(1), MAY_CHANGE, RESEARCH] = None
    """With fsdp, ranks that hold one copy of the model between them; by default those of one machine."""


@part
class OptimConfig:
    """Optimizer. The defaults are the paper's (table 8)."""

    blr: Annotated[float, Gt(0)] = 1.5e-4
    """Base learning rate: the rate is blr × batch size / 256."""
    lr: Annotated[float | None, Gt(0)] = None
    """The peak learning rate itself, instead of --blr."""
    warmup_epochs: Annotated[float | None, Ge(0)] = None
    """Epochs of linear warm-up from 0; by default 5% of the run, which is the paper's 40 of 800."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Weight decay of matrices, the cls and the mask token; biases and norms have none."""
    clip_grad: Annotated[float | None, Gt(0)] = None
    """Largest norm of the gradient; by default it is not clipped."""
    ema: Annotated[float | None, Gt(0), Lt(1)] = None
    """Decay of an exponential moving average of the weights, such as 0.9999, kept beside them."""

    def peak_lr(self, batch_size: int) -> float:
        """The highest learning rate of the run, for images per update over all ranks."""
        return self.lr if self.lr is not None else self.blr * batch_size / 256


@part
class LayerDecayConfig:
    """Optimizer of fine-tuning."""

    layer_decay: Annotated[float, Gt(0), Le(1)] = 0.75
    """Each layer's learning rate as a share of that of the layer above it."""
    min_lr: Annotated[float, Ge(0)] = 1e-6
    """Where the cosine ends."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """AdamW's second coefficient; the scratch recipe's is 0.95."""

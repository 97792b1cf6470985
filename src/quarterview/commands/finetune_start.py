"""The initial weights of fine-tuning: their configuration, digest and license."""

from pathlib import Path
from typing import Any

from quarterview.commands.config import FinetuneConfig
from quarterview.errors import UserError
from quarterview.models.config import ClassifierConfig
from quarterview.training import checkpoint
from quarterview.training.run import OpenRun
from quarterview.weights.config import SCRATCH
from quarterview.weights.facts import read_model_info
from quarterview.weights.loading import read_config, read_header_config, read_weights


def read_resumed_config(config: FinetuneConfig) -> ClassifierConfig | None:
    """Return the configuration of the classifier in the run's newest checkpoint; None for a new run."""
    newest = _find_newest_checkpoint(config)
    model_config = read_header_config(newest / "model.safetensors") if newest else None
    return model_config if isinstance(model_config, ClassifierConfig) else None


def _find_newest_checkpoint(config: FinetuneConfig) -> Path | None:
    return checkpoint.find_newest(Path(config.run.out) / "checkpoints") if config.run.out else None


def has_start_moved(config: FinetuneConfig) -> bool:
    """Return whether the run in the folder was started from the same weights at another path."""
    newest = _find_newest_checkpoint(config)
    if newest is None or config.start.run == SCRATCH:
        return False
    state = checkpoint.read_state(newest)
    before = FinetuneConfig.flatten(state["config"])["run"]
    return before != config.start.run and state["resolved"]["start"] == compute_start_digest(config)


def get_start_info(config: FinetuneConfig, run: OpenRun) -> dict[str, Any]:
    """Return the digest and license of the initial weights, as they were at the first start of the run."""
    if run.resolved:
        return {name: run.resolved.get(name) for name in ("start", "licence")}
    return {"start": compute_start_digest(config), "licence": _read_start_license(config)}


def compute_start_digest(config: FinetuneConfig) -> str | None:
    """Return a digest (16 hex digits) of the initial weights; None from scratch."""
    start = config.start.run
    return None if start == SCRATCH else read_weights(start, config.tuning.from_ema).digest


def _read_start_license(config: FinetuneConfig) -> str:
    """Return the license of the initial weights, as far as known, which also applies to the fine-tuned
    ones."""
    start = config.start.run
    return "" if start == SCRATCH else read_model_info(start, config.tuning.from_ema).license


def get_initial_config(config: FinetuneConfig) -> ClassifierConfig:
    """Return the configuration of the classifier from the initial weights, with the default number of
    classes.

    Raises:
        UserError: if the network is not known, or the flags give another one.
    """
    start, tuning = config.start, config.tuning
    if start.run == SCRATCH:
        if start.model is None or tuning.image_size is None:
            raise UserError(
                "RUN is scratch, so the network must be given. Give --model and --image-size, such as "
                "--model mae_vit_tiny_patch4 --image-size 32."
            )
        cls_tokens = 1 if tuning.cls_tokens is None else tuning.cls_tokens
        network = (start.model, tuning.image_size, tuning.in_chans)
        return ClassifierConfig(*network, cls_tokens=cls_tokens, pool=tuning.pool)
    theirs = read_config(start.run, tuning.from_ema)
    if start.model not in (None, theirs.model):
        raise UserError(
            f"--model {start.model} differs from the model of {start.run}, {theirs.model}. Remove --model."
        )
    if tuning.cls_tokens not in (None, theirs.cls_tokens):
        raise UserError(
            f"--cls-tokens {tuning.cls_tokens} differs from the {theirs.cls_tokens} of {start.run}. Remove "
            "--cls-tokens."
        )
    size = tuning.image_size or theirs.image_size
    network = (theirs.model, size, theirs.in_chans, theirs.mean, theirs.std, theirs.cls_tokens)
    return ClassifierConfig(*network, pool=tuning.pool)

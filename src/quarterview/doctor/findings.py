"""Findings on a run: problems, their likely causes and fixes, from its measurements.

The thresholds were chosen on other runs than those of `benchmarks/doctor_runs.py`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from quarterview.doctor.examined import (
    MIN_IMPROVEMENT,
    MIN_STANDARD_ERRORS,
    MODEL,
    RunMeasurements,
    compute_reference_lr,
)
from quarterview.doctor.inpainters import INTERPOLATED, NEAREST, ZERO
from quarterview.training.config import OptimConfig

Severity = Literal["error", "warning", "ok"]

HIGH_LR_RATIO, SUSPECT_LR_RATIO, LOW_LR_RATIO = 10.0, 3.0, 0.02
"""Ratios of the peak learning rate to that of `compute_reference_lr`. Above the first, the learning rate is
reported, and an error if the model is bad. Above the second, it is an error if nothing was learned. Below the
third, it is reported as low."""
USEFUL_MASK_RATIOS, POSSIBLE_MASK_RATIOS = (0.4, 0.9), (0.1, 0.95)
"""Ranges of mask ratios that work well (He et al. 2021, figure 5), and of those that can work at all."""
NOISE_CORRELATION, LOW_CORRELATION = 0.1, 0.3
"""Maximum correlation of neighbouring pixels in pure noise, and in very noisy images."""
EQUAL_VARIANCE_RATIO, SIMILAR_VARIANCE_RATIO = 0.01, 0.05
"""Maximum between-image variance ratio of equal images, and of similar images."""
_GRAY_LEVEL = 1 / 255  # one step of 8-bit values, in [0, 1]
_MIN_STEPS = 500  # a shorter run may not have learned anything yet
_SHORT_RUN = ("a short run", "more --epochs or --steps")


class Finding(NamedTuple):
    """A result of the diagnosis."""

    severity: Severity
    name: str
    """A stable short name, such as ``learning rate``."""
    evidence: str
    """The measurements that show it."""
    cause: str = ""
    """The likely cause."""
    fix: str = ""
    """The flag to change, or another fix."""


def diagnose(run: RunMeasurements) -> list[Finding]:
    """Return all findings on a run, errors first."""
    checks: tuple[Callable[[RunMeasurements], list[Finding]], ...] = (
        check_equal_images,
        check_structure,
        check_broken_images,
        check_mask_ratio,
        check_learning_rate,
        check_skipped_steps,
        check_training_loss,
        check_overfitting,
        check_collapse,
        check_data_wait,
    )
    findings = [finding for check in checks for finding in check(run)]
    findings += check_reconstruction(run, is_explained=any(f.severity == "error" for f in findings))
    return sort_by_severity(findings)


def sort_by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings: errors, then warnings, then ok."""
    order = ("error", "warning", "ok")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


# ---------------------------------------------------------------------- the images


def check_equal_images(run: RunMeasurements) -> list[Finding]:
    """Check that the images differ from each other."""
    p = run.image_statistics
    if p is None or p.count < 2:
        return []
    evidence = (
        f"of {p.count} images, {p.repeated:.0%} are copies of another one and {p.constant:.0%} have a single "
        f"color; the standard deviation of a pixel over the images is {255 * p.difference:.2f} of 255, and "
        f"{p.between_variance_ratio:.2%} of the variance is between images"
    )
    cause = "the wrong folder: labels, masks, thumbnails or copies of one image"
    fix = "check the files of --data, and give the folder of the images"
    faint = run.is_eight_bit and p.difference < 1.5 * _GRAY_LEVEL
    if p.between_variance_ratio < EQUAL_VARIANCE_RATIO or faint or p.repeated > 0.5 or p.constant > 0.5:
        return [Finding("error", "equal images", f"the images are nearly equal: {evidence}", cause, fix)]
    if p.between_variance_ratio < SIMILAR_VARIANCE_RATIO or p.repeated > 0.05 or p.constant > 0.1:
        return [Finding("warning", "similar images", evidence, cause, fix)]
    return []


def check_structure(run: RunMeasurements) -> list[Finding]:
    """Check that neighbouring pixels are correlated."""
    p = run.image_statistics
    if p is None or p.neighbours is None or any(f.severity == "error" for f in check_equal_images(run)):
        return []
    evidence = f"the correlation of neighbouring pixels is {p.neighbours:.2f} (photographs: 0.8 to 1)"
    names = (run.best_constant, NEAREST, INTERPOLATED)
    constant, nearest, interpolated = (run.get_mean_loss(name) for name in names)
    is_unpredictable = False
    if constant is not None and nearest is not None and interpolated is not None:
        evidence += f"; the loss of interpolation is {interpolated:.3f}, that of a constant {constant:.3f}"
        is_unpredictable = min(nearest, interpolated) > 0.98 * constant
    cause = "pixels in the wrong order (shape, stride or byte order of the file), or pure noise"
    fix = "check the images as the run reads them (the top row of samples/*.png)"
    if p.neighbours < NOISE_CORRELATION or (p.neighbours < LOW_CORRELATION and is_unpredictable):
        return [
            Finding("error", "no structure", f"the images have no spatial structure: {evidence}", cause, fix)
        ]
    if p.neighbours < LOW_CORRELATION:
        return [
            Finding(
                "warning", "noisy images", evidence, "very noisy images", "denoise or downscale the images"
            )
        ]
    return []


def check_broken_images(run: RunMeasurements) -> list[Finding]:
    """Check that the images can be read."""
    if not run.num_broken or not run.num_images:
        return []
    fraction = run.num_broken / run.num_images
    return [
        Finding(
            "error" if fraction > 0.1 else "warning",
            "broken images",
            f"{run.num_broken} of {run.num_images} images ({fraction:.2%}) could not be read",
            "incomplete downloads, or files that are not images",
            "repair or remove the images listed in bad_samples.jsonl; --max-bad-samples is the limit",
        )
    ]


# ---------------------------------------------------------------------- the configuration


def check_mask_ratio(run: RunMeasurements) -> list[Finding]:
    """Check that the mask ratio leaves enough visible patches, and enough masked ones."""
    ratio, num_visible = run.model.mask_ratio, int(run.model.num_patches * (1 - run.model.mask_ratio))
    if USEFUL_MASK_RATIOS[0] <= ratio <= USEFUL_MASK_RATIOS[1]:
        return []
    evidence = f"a mask ratio of {ratio:g} leaves {num_visible} of {run.model.num_patches} patches visible"
    improvement = run.compute_improvement(run.best_constant) if run.losses else None
    if improvement is not None:
        evidence += f"; the loss of the model is {improvement[0]:.1%} below that of a constant"
    is_high = ratio > USEFUL_MASK_RATIOS[1]
    is_extreme = not POSSIBLE_MASK_RATIOS[0] <= ratio <= POSSIBLE_MASK_RATIOS[1]
    cause = (
        "too few visible patches to predict the others"
        if is_high
        else "so few masked patches that copying their neighbours is enough"
    )
    return [
        Finding(
            "error" if is_extreme else "warning",
            "mask ratio",
            evidence,
            cause,
            "--mask-ratio 0.75 (0.4 to 0.9 work)",
        )
    ]


def check_learning_rate(run: RunMeasurements) -> list[Finding]:
    """Check the peak learning rate, its effects on the run, and the warm-up."""
    batch, width = run.loop.batch_size, run.model.shape.width
    peak_lr, reference_lr = run.optim.peak_lr(batch), compute_reference_lr(batch, width)
    paper_lr = OptimConfig().peak_lr(batch)
    evidence = (
        f"the peak learning rate {peak_lr:.2g} is {peak_lr / paper_lr:.3g} times that of the paper's rule "
        f"(1.5e-4 × batch / 256) and {run.relative_lr:.2g} times {reference_lr:.1g}, the paper's rescaled "
        f"to batch size {batch} and width {width}"
    )
    findings = []
    is_weak = run.beats_all_inpainters is False and not has_just_begun(run)
    is_bad = is_weak or has_loss_risen(run) or run.history.num_skipped > 0
    has_symptoms = run.relative_lr > HIGH_LR_RATIO and is_bad
    has_symptoms |= run.relative_lr > SUSPECT_LR_RATIO and is_stuck(run)
    if has_symptoms or run.relative_lr > HIGH_LR_RATIO:
        evidence += "; " + (describe_symptoms(run) if has_symptoms else "it has done no visible harm so far")
        severity: Severity = "error" if has_symptoms else "warning"
        cause = "--blr or --lr is far too high"
        findings.append(Finding(severity, "learning rate", evidence, cause, f"--lr {reference_lr:.1g}"))
    elif run.relative_lr < LOW_LR_RATIO:
        cause = "--blr or --lr is too low for this batch size, so the run learns slowly"
        findings.append(Finding("warning", "low learning rate", evidence, cause, f"--lr {reference_lr:.1g}"))
    fix = "remove --warmup-epochs: the default is 5% of the run"
    if run.warmup_steps == 0 and run.num_steps > 1 and run.relative_lr > 1:
        evidence = "there is no warm-up, and the learning rate is above the reference"
        findings.append(Finding("warning", "warm-up", evidence, "--warmup-epochs 0", fix))
    elif run.warmup_steps > 0.3 * run.num_steps:
        evidence = f"the warm-up takes {run.warmup_steps} of {run.num_steps} steps"
        findings.append(Finding("warning", "warm-up", evidence, "a warm-up meant for a longer run", fix))
    return findings


def describe_symptoms(run: RunMeasurements) -> str:
    """Describe the effects of a learning rate that is too high."""
    symptoms = []
    loss = run.get_mean_loss(MODEL)
    if run.has_learned is False:
        constant_loss = run.get_mean_loss(run.best_constant)
        symptoms.append(f"the model (loss {loss:.3f}) is no better than a constant ({constant_loss:.3f})")
    elif run.beats_all_inpainters is False:
        best_loss = run.get_mean_loss(run.best_inpainter)
        symptoms.append(f"the model (loss {loss:.3f}) is worse than {run.best_inpainter} ({best_loss:.3f})")
    if has_loss_risen(run):
        symptoms.append(f"the training loss rose from {run.history.min_loss:.3f} to {run.history.loss:.3f}")
    if run.history.num_skipped:
        symptoms.append(f"{run.history.num_skipped} steps had gradients that are not finite")
    return "; ".join(symptoms)


def has_just_begun(run: RunMeasurements) -> bool:
    """Return True if the run is too young to judge what it has learned."""
    h = run.history
    return not run.is_finished and (h.step < 2 * run.warmup_steps or h.num_rows < 6)


def is_stuck(run: RunMeasurements) -> bool:
    """Return True if the model has learned nothing in enough steps, and its loss is not decreasing."""
    h, over_zero = run.history, run.compute_improvement(ZERO)
    if run.has_learned is not False or h.step < max(100, 2 * run.warmup_steps):
        return False
    return (
        over_zero is None
        or over_zero[0] <= MIN_IMPROVEMENT
        or (h.step >= _MIN_STEPS and h.recent_decrease <= 0.02)
    )


def has_loss_risen(run: RunMeasurements) -> bool:
    """Return True if the last training loss is more than 1.3 times the minimum."""
    h = run.history
    return h.loss is not None and h.min_loss is not None and h.loss > 1.3 * h.min_loss


# ---------------------------------------------------------------------- the training history


def check_skipped_steps(run: RunMeasurements) -> list[Finding]:
    """Check for steps that were skipped because of gradients that are not finite."""
    skipped = run.history.num_skipped
    if not skipped:
        return []
    fraction = skipped / max(1, run.history.step)
    return [
        Finding(
            "error" if fraction > 0.01 else "warning",
            "skipped steps",
            f"{skipped} of {run.history.step} steps ({fraction:.2%}) had gradients that are not finite",
            "a learning rate that is too high, pixels out of range, or bf16",
            "--clip-grad 1, a lower --lr, or --precision fp32; skipped_steps.jsonl lists the images",
        )
    ]


def check_training_loss(run: RunMeasurements) -> list[Finding]:
    """Check for divergence, loss spikes and growing gradients."""
    h, findings = run.history, []
    if has_loss_risen(run) and run.relative_lr <= HIGH_LR_RATIO:
        evidence = f"the training loss rose from {h.min_loss:.3f} to {h.loss:.3f} and stayed there"
        fix = "--clip-grad 1, a lower --lr, or a longer warm-up"
        findings.append(Finding("error", "diverged", evidence, "the run diverged", fix))
    elif h.spikes:
        step, ratio = max(h.spikes, key=lambda spike: spike[1])
        evidence = (
            f"the training loss has {len(h.spikes)} spike(s), the largest at step {step} ({ratio:.1f} times)"
        )
        cause = "a learning rate close to the limit of stability"
        findings.append(Finding("warning", "spikes", evidence, cause, "--clip-grad 1, or a lower --lr"))
    if h.grad_norm_growth is not None and h.grad_norm_growth > 10:
        evidence = f"the gradient norm grew by a factor of {h.grad_norm_growth:.0f} over the run"
        cause = "the run is about to diverge"
        fix = "--clip-grad 1, or a lower --lr"
        findings.append(Finding("warning", "growing gradients", evidence, cause, fix))
    return findings


def check_overfitting(run: RunMeasurements) -> list[Finding]:
    """Check that the loss on held-out images is not much higher than that on training images."""
    h, val_losses = run.history, run.losses.get(MODEL) if run.losses else None
    if not run.is_held_out or val_losses is None or run.train_losses is None or len(val_losses) < 2:
        return []
    train_loss, val_loss = float(run.train_losses.mean()), float(val_losses.mean())
    error = math.sqrt(sum(float(losses.var()) / len(losses) for losses in (run.train_losses, val_losses)))
    if (
        h.last_val_loss is None
        or h.min_val_loss is None
        or h.last_val_loss < 1.05 * h.min_val_loss
        or has_loss_risen(run)
    ):
        return []
    if val_loss < 1.05 * train_loss or val_loss - train_loss < MIN_STANDARD_ERRORS * error:
        return []
    evidence = (
        f"the held-out loss rose from its minimum {h.min_val_loss:.3f} at step {h.min_val_loss_step} to "
        f"{h.last_val_loss:.3f}; the loss on training images is {train_loss:.3f}, on others {val_loss:.3f}"
    )
    cause = f"too many epochs ({h.epoch:.0f}) on too few images for a model of this size"
    fix = "fewer --epochs, a smaller --model, or more images"
    return [Finding("warning", "overfitting", evidence, cause, fix)]


def check_collapse(run: RunMeasurements) -> list[Finding]:
    """Check that the encoder gives different features for different images."""
    features, random, pixels = run.encoder_statistics, run.random_encoder_statistics, run.pixel_statistics
    if features is None or random is None or pixels is None:
        return []
    ratio, random_ratio = features.between_variance_ratio, random.between_variance_ratio
    evidence = (
        f"the features have effective rank {features.effective_rank:.1f} (random encoder "
        f"{random.effective_rank:.1f}, pixels {pixels.effective_rank:.1f}), between-image variance ratio "
        f"{ratio:.2%} (random encoder {random_ratio:.2%}) and mean cosine similarity "
        f"{features.mean_cosine:.3f} (random {random.mean_cosine:.3f}, pixels {pixels.mean_cosine:.3f})"
    )
    if any(f.severity == "error" for f in (*check_equal_images(run), *check_structure(run))):
        return []
    is_poor = ratio < 0.1 * random_ratio or features.effective_rank < 0.25 * random.effective_rank
    if ratio < 1e-3 * random_ratio or (is_poor and run.has_learned is False):
        cause = "the encoder gives nearly equal features for all images, mostly because of the learning rate"
        return [Finding("error", "collapse", evidence, cause, "a lower --lr, or another --seed")]
    if is_poor:
        cause = "the features keep little of the differences between images"
        return [Finding("warning", "poor features", evidence, cause, "a lower --lr, or a longer run")]
    return [Finding("ok", "features", evidence)]


def check_data_wait(run: RunMeasurements) -> list[Finding]:
    """Check that training does not wait for images."""
    fraction = run.history.data_wait
    if fraction is None or fraction < 0.3:
        return []
    return [
        Finding(
            "warning",
            "data wait",
            f"{fraction:.0%} of the time was spent waiting for images",
            "decoding is slower than the model",
            "more --workers, smaller files, or --cache device",
        )
    ]


# ---------------------------------------------------------------------- the reconstruction


def check_reconstruction(run: RunMeasurements, is_explained: bool) -> list[Finding]:
    """Check that the model is better than the trivial inpainters.

    Args:
        is_explained: True if another error explains a model that is not better.
    """
    if run.has_learned is None:
        return []
    losses = (
        f"loss {run.get_mean_loss(MODEL):.3f}, {run.best_constant} {run.get_mean_loss(run.best_constant):.3f}"
    )
    if run.best_inpainter != run.best_constant:
        losses += f", {run.best_inpainter} {run.get_mean_loss(run.best_inpainter):.3f}"
    findings = []
    if not run.has_learned:
        if not is_explained:
            findings.append(explain_nothing_learned(run, losses))
        return findings
    if run.beats_all_inpainters:
        evidence = f"the model is better than every trivial inpainter: {losses}"
        findings.append(Finding("ok", "reconstruction", evidence))
    elif not is_explained:
        evidence = f"the model is better than a constant, but not than {run.best_inpainter}: {losses}"
        findings.append(Finding("warning", "young", evidence, *_SHORT_RUN))
    if run.model.normalizes_patches:
        findings.append(describe_normalized_targets(run))
    return findings


def explain_nothing_learned(run: RunMeasurements, losses: str) -> Finding:
    """Return the finding for a model that is no better than a constant, if no other error explains it.

    Args:
        losses: the losses of the model and of the inpainters, as a text.
    """
    evidence, h = f"the model is no better than a constant: {losses}", run.history
    over_zero = run.compute_improvement(ZERO)
    beats_zero = (
        over_zero is not None and over_zero[0] > MIN_IMPROVEMENT and over_zero[1] > MIN_STANDARD_ERRORS
    )
    is_short = h.step < _MIN_STEPS or h.recent_decrease > 0.02
    if is_short and beats_zero:
        return Finding("warning", "young", evidence, *_SHORT_RUN)
    if has_just_begun(run) or (not run.is_finished and h.recent_decrease > 0.005):
        return Finding("warning", "young", evidence, "the run has just begun", "check again later")
    if is_short:
        cause = f"{h.step} steps are too few"
        return Finding("error", "nothing learned", evidence, cause, "more --epochs or --steps")
    flat = run.image_statistics.flat if run.image_statistics and run.model.normalizes_patches else 0.0
    if flat > 0.5:
        cause = f"{flat:.0%} of the patches are constant, so the normalised targets are mostly noise"
        return Finding("error", "nothing learned", evidence, cause, "--no-norm-pix-loss")
    cause = "images whose masked patches cannot be predicted at this patch size, or a wrong learning rate"
    reference_lr = compute_reference_lr(run.loop.batch_size, run.model.shape.width)
    return Finding("error", "nothing learned", evidence, cause, f"--lr {reference_lr:.1g}, or larger images")


def describe_normalized_targets(run: RunMeasurements) -> Finding:
    """Return the finding that explains why predictions of normalised patches look noisy."""
    improvement = run.compute_improvement(ZERO)
    assert improvement is not None
    evidence = (
        "the targets are normalised by the mean and standard deviation of each patch, so reconstructions "
        f"look noisy and patchy; the model explains {improvement[0]:.0%} of the variance in masked patches"
    )
    return Finding("ok", "normalised targets", evidence, "", "--no-norm-pix-loss for better reconstructions")

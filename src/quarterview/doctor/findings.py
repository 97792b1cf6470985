"""From what was measured of a run to what is wrong with it, why, and which flag to change.

The thresholds were fixed on other runs than those that `benchmarks/doctor_runs.py` judges.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from quarterview.doctor.examined import CERTAIN, LEAST_GAIN, MODEL, Examined, usual_rate
from quarterview.doctor.inpainters import INTERPOLATED, NEAREST, ZERO
from quarterview.training.config import OptimConfig

Severity = Literal["ailment", "caution", "fine"]

RATE_HIGH, RATE_SUSPECT, RATE_LOW = 10.0, 3.0, 0.02
"""How many times `usual_rate` the peak learning rate may be: beyond the first it is worth a word, and to
blame if the model is weak; beyond the second to blame if nothing is learned; below the third low."""
RATIO_USEFUL, RATIO_POSSIBLE = (0.4, 0.9), (0.1, 0.95)
"""Mask ratios that are known to work well (He et al. 2021, figure 5), and beyond which nothing is learned."""
NO_NEIGHBOURS, FEW_NEIGHBOURS = 0.1, 0.3
"""Correlations of neighbouring pixels: of noise, and of very noisy pictures."""
SAME, ALIKE = 0.01, 0.05
"""Shares of the variance that is between images: equal ones, and nearly so."""
_GREY_LEVEL = 1 / 255
_FEW_STEPS = 500
_YOUNG = ("a short run, so far", "more --epochs or --steps")


class Finding(NamedTuple):
    """One thing that was found."""

    severity: Severity
    name: str
    """A word or two by which programs know it, such as ``learning rate``."""
    seen: str
    """What was measured, with the figures."""
    cause: str = ""
    """What likely brought it about."""
    remedy: str = ""
    """The flag to change, or what else to do."""


def diagnose(run: Examined) -> list[Finding]:
    """Everything worth saying, ailments first."""
    rules: tuple[Callable[[Examined], list[Finding]], ...] = (
        equal_images,
        structure,
        broken_images,
        mask_ratio,
        learning_rate,
        skipped_steps,
        course,
        overfitting,
        collapse,
        waiting,
    )
    found = [finding for rule in rules for finding in rule(run)]
    found += progress(run, explained=any(f.severity == "ailment" for f in found))
    return by_severity(found)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The same findings, the worst first."""
    order = ("ailment", "caution", "fine")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


# ---------------------------------------------------------------------- the images


def equal_images(run: Examined) -> list[Finding]:
    """Are the images different from one another?"""
    p = run.pictures
    if p is None or p.count < 2:
        return []
    figures = (
        f"of {p.count} images {p.repeated:.0%} repeat an earlier one and {p.constant:.0%} are of one colour; "
        f"at one place a pixel varies by {255 * p.difference:.2f} of 255 between images, {p.between:.2%} of "
        "all variance"
    )
    cause = "another folder than meant: labels, masks, thumbnails or one picture many times"
    remedy = "look at the files that --data names, and name those of the pictures"
    faint = run.eight_bit and p.difference < 1.5 * _GREY_LEVEL
    if p.between < SAME or faint or p.repeated > 0.5 or p.constant > 0.5:
        return [Finding("ailment", "equal images", f"the images are all but equal: {figures}", cause, remedy)]
    if p.between < ALIKE or p.repeated > 0.05 or p.constant > 0.1:
        return [Finding("caution", "similar images", figures, cause, remedy)]
    return []


def structure(run: Examined) -> list[Finding]:
    """Do neighbouring pixels have to do with each other?"""
    p = run.pictures
    if p is None or p.neighbours is None or any(f.severity == "ailment" for f in equal_images(run)):
        return []
    seen = f"neighbouring pixels correlate by {p.neighbours:.2f} (photographs: 0.8 to 1)"
    floor, nearest, smooth = (run.loss(name) for name in (run.floor, NEAREST, INTERPOLATED))
    if floor is not None and nearest is not None and smooth is not None:
        seen += f"; interpolation scores {smooth:.3f} and a constant {floor:.3f}"
        useless = min(nearest, smooth) > 0.98 * floor
    else:
        useless = False
    cause = (
        "pixels out of order: a wrong shape, stride or byte order when the file was written, or pure noise"
    )
    remedy = "view some images as --data gives them (the top row of samples/*.png)"
    if p.neighbours < NO_NEIGHBOURS or (p.neighbours < FEW_NEIGHBOURS and useless):
        return [
            Finding("ailment", "no structure", f"the images have no spatial structure: {seen}", cause, remedy)
        ]
    if p.neighbours < FEW_NEIGHBOURS:
        return [
            Finding("caution", "noisy images", seen, "very noisy pictures", "denoise or shrink them first")
        ]
    return []


def broken_images(run: Examined) -> list[Finding]:
    """Could the images be read?"""
    if not run.broken or not run.images:
        return []
    share = run.broken / run.images
    return [
        Finding(
            "ailment" if share > 0.1 else "caution",
            "broken images",
            f"{run.broken} of {run.images} images ({share:.2%}) could not be read",
            "cut off downloads, or files that are no images",
            "bad_samples.jsonl names them: mend or remove them; --max-bad-samples is the limit",
        )
    ]


# ---------------------------------------------------------------------- the configuration


def mask_ratio(run: Examined) -> list[Finding]:
    """Is there something to see, and something to guess?"""
    ratio, kept = run.model.mask_ratio, int(run.model.patches * (1 - run.model.mask_ratio))
    if RATIO_USEFUL[0] <= ratio <= RATIO_USEFUL[1]:
        return []
    seen = f"a mask ratio of {ratio:g} leaves {kept} of {run.model.patches} patches visible"
    gain = run.gain(run.floor) if run.losses else None
    if gain is not None:
        seen += f"; from those the model gets {gain[0]:.1%} below a constant"
    high = ratio > RATIO_USEFUL[1]
    far = not RATIO_POSSIBLE[0] <= ratio <= RATIO_POSSIBLE[1]
    cause = (
        "too little is seen to guess the rest"
        if high
        else "so little is hidden that copying neighbours will do"
    )
    return [
        Finding(
            "ailment" if far else "caution", "mask ratio", seen, cause, "--mask-ratio 0.75; 0.4 to 0.9 work"
        )
    ]


def learning_rate(run: Examined) -> list[Finding]:
    """Is the peak where such models learn, and if not, does it show?"""
    batch, width = run.loop.batch_size, run.model.shape.width
    peak, usual, rule = run.optim.peak_lr(batch), usual_rate(batch, width), OptimConfig().peak_lr(batch)
    seen = (
        f"the peak learning rate {peak:.2g} is {peak / rule:.3g} times the paper's rule "
        f"(1.5e-4 × batch / 256) and {run.rate:.2g} times {usual:.1g}, the same with allowance for a "
        f"batch of {batch} and a width of {width}"
    )
    found = []
    weak = run.beats_all is False and not only_begun(run)
    ill = run.rate > RATE_HIGH and (weak or risen(run) or run.history.skipped > 0)
    ill |= run.rate > RATE_SUSPECT and stuck(run)
    if ill or run.rate > RATE_HIGH:
        symptom = ", and it shows: " + symptoms(run) if ill else "; so far no harm is to be seen"
        remedy = f"--lr {usual:.1g}"
        severity: Severity = "ailment" if ill else "caution"
        cause = "--blr or --lr far too high: each step undoes the one before"
        found.append(Finding(severity, "learning rate", seen + symptom, cause, remedy))
    elif run.rate < RATE_LOW:
        cause = "--blr or --lr too low for so small a batch: the run learns slowly"
        found.append(Finding("caution", "low learning rate", seen, cause, f"--lr {usual:.1g}"))
    if run.warmup == 0 and run.steps > 1 and run.rate > 1:
        seen = "there is no warm-up, at a learning rate above the usual"
        found.append(
            Finding(
                "caution", "warm-up", seen, "--warmup-epochs 0", "leave --warmup-epochs out: 5% of the run"
            )
        )
    elif run.warmup > 0.3 * run.steps:
        seen = f"the warm-up takes {run.warmup} of {run.steps} updates"
        cause = "a warm-up meant for a longer run"
        found.append(Finding("caution", "warm-up", seen, cause, "leave --warmup-epochs out: 5% of the run"))
    return found


def symptoms(run: Examined) -> str:
    """What a learning rate that is too high did."""
    said = []
    if run.learned is False:
        said.append(
            f"the model ({run.loss(MODEL):.3f}) is no better than a constant ({run.loss(run.floor):.3f})"
        )
    elif run.beats_all is False:
        said.append(f"the model ({run.loss(MODEL):.3f}) is worse than {run.best} ({run.loss(run.best):.3f})")
    if risen(run):
        said.append(f"the loss rose from {run.history.lowest:.3f} to {run.history.loss:.3f}")
    if run.history.skipped:
        said.append(f"{run.history.skipped} updates gave gradients that are not finite")
    return "; ".join(said)


def only_begun(run: Examined) -> bool:
    """Whether it is too early to ask what was learned."""
    h = run.history
    return not run.done and (h.step < 2 * run.warmup or h.rows < 6)


def stuck(run: Examined) -> bool:
    """Whether nothing was learned in a time that should do, and nothing is under way."""
    h, begun = run.history, run.gain(ZERO)
    if run.learned is not False or h.step < max(100, 2 * run.warmup):
        return False
    return begun is None or begun[0] <= LEAST_GAIN or (h.step >= _FEW_STEPS and h.falling <= 0.02)


def risen(run: Examined) -> bool:
    """Whether the training loss ended well above where it once was."""
    h = run.history
    return h.loss is not None and h.lowest is not None and h.loss > 1.3 * h.lowest


# ---------------------------------------------------------------------- the course of the run


def skipped_steps(run: Examined) -> list[Finding]:
    """Were there gradients that are not finite?"""
    skipped = run.history.skipped
    if not skipped:
        return []
    share = skipped / max(1, run.history.step)
    return [
        Finding(
            "ailment" if share > 0.01 else "caution",
            "skipped steps",
            f"{skipped} of {run.history.step} updates ({share:.2%}) had gradients that are not finite",
            "a learning rate too high, pixels out of range, or bf16",
            "--clip-grad 1, a lower --lr, or --precision fp32; skipped_steps.jsonl names the images",
        )
    ]


def course(run: Examined) -> list[Finding]:
    """Spikes, and a loss that went up and stayed there."""
    h, found = run.history, []
    if risen(run) and run.rate <= RATE_HIGH:
        seen = f"the training loss rose from {h.lowest:.3f} to {h.loss:.3f} and stayed there"
        cause = "the run diverged"
        found.append(
            Finding("ailment", "diverged", seen, cause, "--clip-grad 1, a lower --lr, or a longer warm-up")
        )
    elif h.spikes:
        step, times = max(h.spikes, key=lambda spike: spike[1])
        seen = (
            f"the loss jumped {len(h.spikes)} time(s), most at step {step} to {times:.1f} times what it was"
        )
        found.append(
            Finding(
                "caution", "spikes", seen, "a learning rate near its limit", "--clip-grad 1, or a lower --lr"
            )
        )
    if h.gradient_growth is not None and h.gradient_growth > 10:
        seen = f"the gradient's norm grew {h.gradient_growth:.0f} times over the run"
        found.append(
            Finding(
                "caution",
                "growing gradients",
                seen,
                "on its way to diverge",
                "--clip-grad 1, or a lower --lr",
            )
        )
    return found


def overfitting(run: Examined) -> list[Finding]:
    """Does the model know the images it was trained on better than others?"""
    h, ours = run.history, run.losses.get(MODEL) if run.losses else None
    if not run.held_out or ours is None or run.trained_losses is None or len(ours) < 2:
        return []
    known, new = float(run.trained_losses.mean()), float(ours.mean())
    error = math.sqrt(sum(float(losses.var()) / len(losses) for losses in (run.trained_losses, ours)))
    if h.val_last is None or h.val_lowest is None or h.val_last < 1.05 * h.val_lowest or risen(run):
        return []
    if new < 1.05 * known or new - known < CERTAIN * error:
        return []
    seen = (
        f"the held-out loss was lowest at step {h.val_lowest_step}, {h.val_lowest:.3f}, and is now "
        f"{h.val_last:.3f}; images that were trained on score {known:.3f}, others {new:.3f}"
    )
    cause = f"too many passes ({h.epoch:.0f}) over too few images for a model of this size"
    return [
        Finding("caution", "overfitting", seen, cause, "fewer --epochs, a smaller --model, or more images")
    ]


def collapse(run: Examined) -> list[Finding]:
    """Does the encoder tell images apart, where they differ?"""
    ours, fresh, pixels = run.encoder, run.fresh, run.pixels
    if ours is None or fresh is None or pixels is None:
        return []
    seen = (
        f"features of the images: effective rank {ours.effective_rank:.1f} (fresh encoder "
        f"{fresh.effective_rank:.1f}, pixels {pixels.effective_rank:.1f}), {ours.share:.2%} of their square "
        f"differs between images (fresh {fresh.share:.2%}), mean cosine {ours.similarity:.3f} "
        f"(fresh {fresh.similarity:.3f}, pixels {pixels.similarity:.3f})"
    )
    if any(f.severity == "ailment" for f in (*equal_images(run), *structure(run))):
        return []
    dull = ours.share < 0.1 * fresh.share or ours.effective_rank < 0.25 * fresh.effective_rank
    if (ours.share < 1e-3 * fresh.share) or (dull and run.learned is False):
        cause = "the encoder gives nearly the same features for every image; most often the learning rate"
        return [Finding("ailment", "collapse", seen, cause, "a lower --lr, or start again with --seed")]
    if dull:
        cause = "the encoder keeps little of what differs between images"
        return [Finding("caution", "poor features", seen, cause, "a lower --lr, or a longer run")]
    return [Finding("fine", "features", seen)]


def waiting(run: Examined) -> list[Finding]:
    """Does the model wait for images?"""
    share = run.history.waiting
    if share is None or share < 0.3:
        return []
    return [
        Finding(
            "caution",
            "data wait",
            f"{share:.0%} of the time was spent waiting for images",
            "decoding is slower than the model",
            "more --workers, smaller files, or --cache device",
        )
    ]


# ---------------------------------------------------------------------- the verdict on the model


def progress(run: Examined, explained: bool) -> list[Finding]:
    """Is the model better than what needs no learning?

    Args:
        explained: whether an ailment has been named that explains it if not.
    """
    if run.learned is None:
        return []
    figures = f"loss {run.loss(MODEL):.3f}, {run.floor} {run.loss(run.floor):.3f}"
    if run.best != run.floor:
        figures += f", {run.best} {run.loss(run.best):.3f}"
    found = []
    if not run.learned:
        if not explained:
            found.append(nothing_learned(run, figures))
        return found
    if run.beats_all:
        found.append(Finding("fine", "reconstruction", f"better than every trivial inpainter: {figures}"))
    elif not explained:
        seen = f"better than a constant, not yet than {run.best}: {figures}"
        found.append(Finding("caution", "young", seen, *_YOUNG))
    if run.model.normalises_patches:
        found.append(normalised(run))
    return found


def nothing_learned(run: Examined, figures: str) -> Finding:
    """The model is no better than a constant, and nothing else explains it."""
    seen, h = f"no better than a constant: {figures}", run.history
    begun = run.gain(ZERO)
    short = h.step < _FEW_STEPS or h.falling > 0.02
    if short and begun is not None and begun[0] > LEAST_GAIN and begun[1] > CERTAIN:
        return Finding("caution", "young", seen, *_YOUNG)
    if only_begun(run) or (not run.done and h.falling > 0.005):
        return Finding("caution", "young", seen, "the run has only begun", "wait, and ask again")
    if short:
        cause = f"{h.step} updates are too few"
        return Finding("ailment", "nothing learned", seen, cause, "more --epochs or --steps")
    flat = run.pictures.flat if run.pictures and run.model.normalises_patches else 0.0
    if flat > 0.5:
        cause = f"{flat:.0%} of the patches are flat, so that normalised targets are mostly noise"
        return Finding("ailment", "nothing learned", seen, cause, "--no-norm-pix-loss")
    cause = (
        "images whose hidden parts cannot be guessed at this patch size, or a learning rate that does not fit"
    )
    usual = usual_rate(run.loop.batch_size, run.model.shape.width)
    return Finding("ailment", "nothing learned", seen, cause, f"--lr {usual:.1g}, or larger images")


def normalised(run: Examined) -> Finding:
    """Predictions of normalised patches look worse than they are."""
    gain = run.gain(ZERO)
    assert gain is not None
    seen = (
        "each patch is predicted up to its own brightness and contrast, so pictures look noisy and patchy; "
        f"that is no failure: {gain[0]:.0%} of what is within hidden patches is explained"
    )
    return Finding("fine", "normalised targets", seen, "", "--no-norm-pix-loss if the pictures matter to you")

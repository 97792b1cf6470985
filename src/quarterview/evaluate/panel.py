"""Reconstruction panels: what the model was shown, and what it made of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from quarterview import draws
from quarterview.data.augment import denormalise, normalise, to_float
from quarterview.data.decode import SUFFIXES, decode
from quarterview.data.loader import central, stack
from quarterview.data.open import open_source
from quarterview.data.source import BadSampleError, Picture
from quarterview.errors import UserError
from quarterview.exchange.weights import load
from quarterview.model.mae import MaskedAutoencoder

_PANEL_MOST = 8
_HIDDEN_GREY = 0.75
_INCHES = 1.2
_MARGIN_INCHES = 0.45


@torch.no_grad()
def draw_panel(model: MaskedAutoencoder, images: Tensor, noise: Tensor, path: Path, title: str = "") -> None:
    """Write a PNG with a column for each image: the original, what is visible, the completed picture.

    Args:
        images: float [B, C, H, W], normalised; the first eight are drawn.
        noise: float [B, L], which decides what is hidden, lowest kept.
    """
    images, noise = images[:_PANEL_MOST], noise[:_PANEL_MOST]
    mask = model(images, noise=noise).mask
    pictures = model.reconstruct(images, mask=mask)
    mean, std = model.config.mean or (0.0,) * images.shape[1], model.config.std or (1.0,) * images.shape[1]
    original, completed = (denormalise(x.float(), mean, std) for x in (images, pictures))
    low, high = _shown_range(mean, std)
    original, completed = (((x - low) / (high - low)).clamp(0, 1) for x in (original, completed))
    hidden = model.unpatchify(mask[:, :, None].expand(-1, -1, model.patch_size**2 * images.shape[1]).float())
    visible = original * (1 - hidden) + _HIDDEN_GREY * hidden
    rows = {
        "original": original,
        f"visible ({1 - mask.float().mean():.0%})": visible,
        "reconstruction": completed,
    }
    _draw(rows, _caption(model), title, path)


def _shown_range(mean: Sequence[float], std: Sequence[float]) -> tuple[float, float]:
    """What is drawn black and white: 0 and 1 for pictures, two deviations around for other arrays.

    It never depends on the pictures drawn, lest hidden patches shine through.
    """
    if all((0 <= m <= 1 and 0.01 < s <= 0.5) or s == 1 for m, s in zip(mean, std, strict=True)):
        return 0.0, 1.0
    return min(m - 2 * s for m, s in zip(mean, std, strict=True)), max(
        m + 2 * s for m, s in zip(mean, std, strict=True)
    )


def _caption(model: MaskedAutoencoder) -> str:
    sentences = ["Reconstruction: visible patches as they are, hidden ones predicted."]
    if model.config.norm_pix_loss:
        sentences.append(
            "\nPatches are predicted up to brightness and contrast, guessed here from visible ones nearby."
        )
    if model.config.in_chans not in (1, 3):
        shown = "first channel" if model.config.in_chans < 3 else "first three channels"
        sentences.append(f"\nShown: the {shown} of {model.config.in_chans}.")
    return " ".join(sentences)


def _draw(rows: dict[str, Tensor], caption: str, title: str, path: Path) -> None:
    """A row for each kind of picture, a column for each image."""
    count, _, height, width = next(iter(rows.values())).shape
    cell = _INCHES * min(2.0, height / width)
    size = (_INCHES * count + 0.3, cell * len(rows) + _MARGIN_INCHES)
    figure = Figure(figsize=size, dpi=100)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, images, strict=True):
            pixels = (image if len(image) >= 3 else image[:1].expand(3, -1, -1))[:3]
            place.imshow(pixels.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=8)
    figure.text(0.01, 0.01, f"{title}. {caption}" if title else caption, fontsize=6, va="bottom", wrap=True)
    figure.subplots_adjust(
        left=0.25 / size[0],
        right=0.99,
        bottom=(_MARGIN_INCHES - 0.05) / size[1],
        top=0.99,
        wspace=0.03,
        hspace=0.03,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_curve(rows: list[dict], path: Path, title: str = "") -> None:
    """Write a PNG of the training and the validation loss over the steps of a run."""
    figure = Figure(figsize=(5, 3), dpi=100)
    axes = figure.subplots()
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label="training", linewidth=1)
    held_out = [(r["step"], r["val_loss"]) for r in rows if r.get("val_loss") is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out", markersize=3, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared error, hidden patches")
    axes.legend()
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def reconstruct_files(run: str, images: Sequence[str], out: str, seed: int) -> None:
    """Draw a panel of pictures from files.

    Args:
        run: a run, a checkpoint folder or a weights file.
        images: picture files, or anything that ``--data`` of pretrain takes.
        out: the PNG to write.
        seed: of the masks.

    Raises:
        UserError: if the model or a picture cannot be read.
    """
    model = load(run)
    config = model.config
    pixels: list[Tensor] = []
    for spec in images:
        path = Path(spec)
        if path.suffix.lower() in SUFFIXES and path.is_file():
            pixels.append(_readable(decode, spec, path.read_bytes(), config.in_chans))
        else:
            source = open_source(spec, config.in_chans)
            pixels += [
                _readable(source.image, source.name(i), i) for i in range(min(len(source), _PANEL_MOST))
            ]
    some = pixels[:_PANEL_MOST]
    if not some:
        raise UserError("no pictures to reconstruct; accepted: picture files, or anything that --data takes")
    batch = to_float(stack([central(image, config.image_size) for image in some]))
    mean, std = config.mean or (0.0,) * config.in_chans, config.std or (1.0,) * config.in_chans
    ids = torch.arange(len(batch))
    noise = model.mask_noise(draws.uniform(seed, "mask", 0, ids, model.uniforms_needed))
    draw_panel(model, normalise(batch, mean, std), noise, Path(out), Path(run).name)


def _readable(read: Callable[..., Picture], name: str, *arguments: object) -> Tensor:
    try:
        return read(*arguments).pixels
    except BadSampleError as error:
        raise UserError(f"{name} cannot be read: {error}") from None

"""Reconstruction panels: what the model was shown, and what it made of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.decode import SUFFIXES, decode
from quarterview.data.loader import central, stack
from quarterview.data.sources.base import BadSampleError, Picture
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import denormalise, normalise, to_float
from quarterview.errors import UserError
from quarterview.evaluation.config import ReconstructConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.weights.loading import load_autoencoder

PANEL_MOST = 8
"""So many pictures are drawn."""
_HIDDEN_GREY = 0.75
_INCHES = 1.2
_NAMES_INCHES, _LINE_INCHES, _GAP_INCHES = 0.3, 0.125, 0.12
_LEAST_INCHES = 3.2
"""Narrower pictures would cut the caption."""


def draw_panel(model: MaskedAutoencoder, images: Tensor, noise: Tensor, path: Path, title: str = "") -> None:
    """Write a PNG with a column for each image: the original, what is visible, the completed picture.

    Args:
        images: float [B, C, H, W], normalised; the first eight are drawn.
        noise: float [B, L], which decides what is hidden, lowest kept.
    """
    images, noise = images[:PANEL_MOST], noise[:PANEL_MOST]
    rows = {"original": shown(images, model.config.mean, model.config.std)}
    rows |= completed_rows(model, images, noise)
    sentences = [*completed_caption(model), *channels_caption(model.config.in_chans)]
    caption = "\n".join(sentences)
    draw_rows(rows, f"{title}. {caption}" if title else caption, path)


@torch.no_grad()
def completed_rows(model: MaskedAutoencoder, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What the model is shown of each image, and the picture as it completes it.

    Args:
        images: float [B, C, H, W], normalised.
        noise: float [B, L], which decides what is hidden, lowest kept.

    Returns:
        float [B, C, H, W] in [0, 1] for each row, by its name.
    """
    mask = model(images, noise=noise).mask
    mean, std = model.config.mean, model.config.std
    hidden = model.unpatchify(mask[:, :, None].expand(-1, -1, model.patch_size**2 * images.shape[1]).float())
    visible = shown(images, mean, std) * (1 - hidden) + _HIDDEN_GREY * hidden
    return {
        f"visible ({1 - mask.float().mean():.0%})": visible,
        "reconstruction": shown(model.reconstruct(images, mask=mask), mean, std),
    }


def shown(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Normalised images as they are drawn: float [B, C, H, W] -> the same in [0, 1]."""
    mean, std = mean or (0.0,) * images.shape[1], std or (1.0,) * images.shape[1]
    low, high = _shown_range(mean, std)
    return ((denormalise(images.float(), mean, std) - low) / (high - low)).clamp(0, 1)


def _shown_range(mean: Sequence[float], std: Sequence[float]) -> tuple[float, float]:
    """What is drawn black and white: 0 and 1 for pictures, two deviations around for other arrays.

    It never depends on the pictures drawn, lest hidden patches shine through.
    """
    if all((0 <= m <= 1 and 0.01 < s <= 0.5) or s == 1 for m, s in zip(mean, std, strict=True)):
        return 0.0, 1.0
    return min(m - 2 * s for m, s in zip(mean, std, strict=True)), max(
        m + 2 * s for m, s in zip(mean, std, strict=True)
    )


def completed_caption(model: MaskedAutoencoder) -> list[str]:
    """What a person should know who looks at `completed_rows`."""
    sentences = ["Reconstruction: visible patches as they are, hidden ones predicted."]
    if model.config.normalises_patches:
        sentences.append(
            "Patches are predicted up to brightness and contrast, guessed here from visible ones nearby."
        )
    return sentences


def channels_caption(channels: int) -> list[str]:
    """Which channels are drawn, if not all."""
    if channels in (1, 3):
        return []
    return [f"Shown: the {'first channel' if channels < 3 else 'first three channels'} of {channels}."]


def draw_rows(rows: Mapping[str, Tensor], caption: str, path: Path) -> None:
    """Write a PNG of pictures in rows that have names.

    Args:
        rows: float [B, C, h, w] in [0, 1], of which the first channel, or the first three, are drawn.
            All have the same B and the same shape of picture, but not the same number of pixels.
        caption: the lines below.
    """
    count, _, height, width = next(iter(rows.values())).shape
    lines = caption.count("\n") + 1
    cell, margin = _INCHES * min(2.0, height / width), _LINE_INCHES * lines + _GAP_INCHES
    size = (max(_INCHES * count, _LEAST_INCHES) + _NAMES_INCHES, cell * len(rows) + margin)
    from matplotlib.figure import Figure  # here, for it takes a second to import

    figure = Figure(figsize=size, dpi=100)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, images, strict=True):
            pixels = (image if len(image) >= 3 else image[:1].expand(3, -1, -1))[:3]
            place.imshow(pixels.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=8)
    figure.text(0.01, 0.05 / size[1], caption, fontsize=6, va="bottom", linespacing=1.3)
    figure.subplots_adjust(
        left=_NAMES_INCHES / size[0],
        right=0.99,
        bottom=(margin - 0.05) / size[1],
        top=1 - 0.03 / size[1],
        wspace=0.03,
        hspace=0.03,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_curve(rows: list[dict], path: Path, title: str = "") -> None:
    """Write a PNG of the training and the validation loss over the steps of a run."""
    from matplotlib.figure import Figure

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


def reconstruct(config: ReconstructConfig) -> Path:
    """Draw a panel of images from files.

    Returns:
        The PNG.

    Raises:
        UserError: if the model or an image cannot be read.
    """
    model = load_autoencoder(config.run)
    shape = model.config
    batch = read_pictures(config.images, shape.in_chans, shape.image_size)
    mean, std = shape.mean or (0.0,) * shape.in_chans, shape.std or (1.0,) * shape.in_chans
    noise = keyed_noise(model, len(batch), config.seed)
    draw_panel(model, normalise(batch, mean, std), noise, Path(config.out), Path(config.run).name)
    return Path(config.out)


def keyed_noise(model: MaskedAutoencoder, count: int, seed: int) -> Tensor:
    """The masks of pictures 0, 1, …, as noise: float [count, L]."""
    return model.mask_noise(rng.uniform(seed, "mask", 0, torch.arange(count), model.uniforms_needed))


def read_pictures(
    specs: Sequence[str], channels: int, image_size: Sequence[int], most: int = PANEL_MOST
) -> Tensor:
    """Central crops of the first pictures of what the specs name.

    Args:
        specs: picture files, or anything that ``--data`` of pretrain takes.
        channels: that they shall have.
        image_size: height and width that they are cut and resized to.
        most: how many are read.

    Returns:
        float [B, C, *image_size] in [0, 1].

    Raises:
        UserError: if one of them cannot be read, or there is none.
    """
    pixels: list[Tensor] = []
    for spec in specs:
        path = Path(spec)
        if path.suffix.lower() in SUFFIXES and path.is_file():
            pixels.append(_readable(decode, spec, path.read_bytes(), channels))
        else:
            source = open_source(spec, channels)
            pixels += [_readable(source.image, source.name(i), i) for i in range(min(len(source), most))]
    if not pixels[:most]:
        raise UserError("no pictures are named; accepted: picture files, or anything that --data takes")
    return to_float(stack([central(image, image_size) for image in pixels[:most]]))


def _readable(read: Callable[..., Picture], name: str, *arguments: object) -> Tensor:
    try:
        return read(*arguments).pixels
    except BadSampleError as error:
        raise UserError(f"{name} cannot be read: {error}") from None

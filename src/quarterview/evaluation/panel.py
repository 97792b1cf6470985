"""Figures of reconstructions and of the loss."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.decode import SUFFIXES, decode
from quarterview.data.loader import resized_center_crop, stack_images
from quarterview.data.sources.base import BadSampleError, DecodedImage
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import denormalize, normalize, to_float
from quarterview.errors import UserError, unreadable
from quarterview.evaluation.config import ReconstructConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.weights.loading import load_autoencoder

MAX_PANEL_IMAGES = 8
"""Maximum number of images in a panel."""
_MASKED_GRAY = 0.75
_IMAGE_INCHES = 1.2
_ROW_NAME_INCHES, _CAPTION_LINE_INCHES, _GAP_INCHES = 0.3, 0.125, 0.12
_MIN_WIDTH_INCHES = 3.2
"""Minimum width of a figure, so that the caption fits."""


def draw_panel(model: MaskedAutoencoder, images: Tensor, noise: Tensor, path: Path, title: str = "") -> None:
    """Write a PNG with a column for each image: the original, the visible patches and the reconstruction.

    Args:
        images: float [B, C, H, W], normalised; the first eight are drawn.
        noise: float [B, L], noise of the masks; the patches with the lowest noise are visible.
    """
    images, noise = images[:MAX_PANEL_IMAGES], noise[:MAX_PANEL_IMAGES]
    rows = {"original": to_display_range(images, model.config.mean, model.config.std)}
    rows |= make_reconstruction_rows(model, images, noise)
    sentences = [*describe_reconstruction(model), *describe_channels(model.config.in_chans)]
    caption = "\n".join(sentences)
    draw_image_grid(rows, f"{title}. {caption}" if title else caption, path)


@torch.no_grad()
def make_reconstruction_rows(model: MaskedAutoencoder, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Compute the two lower rows of a panel: the visible patches and the reconstruction of each image.

    Args:
        images: float [B, C, H, W], normalised.
        noise: float [B, L], noise of the masks; the patches with the lowest noise are visible.

    Returns:
        Name of the row -> images, float [B, C, H, W] in [0, 1].
    """
    mask = model(images, noise=noise).mask
    mean, std = model.config.mean, model.config.std
    masked = model.unpatchify(mask[:, :, None].expand(-1, -1, model.patch_size**2 * images.shape[1]).float())
    visible = to_display_range(images, mean, std) * (1 - masked) + _MASKED_GRAY * masked
    return {
        f"visible ({1 - mask.float().mean():.0%})": visible,
        "reconstruction": to_display_range(model.reconstruct(images, mask=mask), mean, std),
    }


def to_display_range(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Convert normalised images, float [B, C, H, W], to the range [0, 1] in which they are drawn."""
    mean, std = mean or (0.0,) * images.shape[1], std or (1.0,) * images.shape[1]
    low, high = _compute_display_range(mean, std)
    return ((denormalize(images.float(), mean, std) - low) / (high - low)).clamp(0, 1)


def _compute_display_range(mean: Sequence[float], std: Sequence[float]) -> tuple[float, float]:
    """Return the values that are drawn black and white.

    They are 0 and 1 if the means and stds are those of values in [0, 1], and two stds around the means
    otherwise. They do not depend on the drawn images, which would reveal masked patches.
    """
    if all((0 <= m <= 1 and 0.01 < s <= 0.5) or s == 1 for m, s in zip(mean, std, strict=True)):
        return 0.0, 1.0
    return min(m - 2 * s for m, s in zip(mean, std, strict=True)), max(
        m + 2 * s for m, s in zip(mean, std, strict=True)
    )


def describe_reconstruction(model: MaskedAutoencoder) -> list[str]:
    """Return the sentences of a caption that explain the rows of `make_reconstruction_rows`."""
    sentences = ["Reconstruction: visible patches unchanged, masked patches predicted."]
    if model.config.normalizes_patches:
        sentences.append(
            "Predicted patches are normalised; mean and std are estimated from visible patches nearby."
        )
    return sentences


def describe_channels(channels: int) -> list[str]:
    """Return the sentences of a caption that name the drawn channels; none if all channels are drawn."""
    if channels in (1, 3):
        return []
    return [f"Drawn: the {'first channel' if channels < 3 else 'first three channels'} of {channels}."]


def draw_image_grid(rows: Mapping[str, Tensor], caption: str, path: Path) -> None:
    """Write a PNG with a grid of images, with a name for each row and a caption below.

    Args:
        rows: name of the row -> images, float [B, C, h, w] in [0, 1]. The first three channels are drawn, or
            the first if there are fewer. All rows have the same B and aspect ratio; their resolutions may
            differ.
        caption: lines of text below the images.
    """
    count, _, height, width = next(iter(rows.values())).shape
    lines = caption.count("\n") + 1
    cell, margin = _IMAGE_INCHES * min(2.0, height / width), _CAPTION_LINE_INCHES * lines + _GAP_INCHES
    size = (max(_IMAGE_INCHES * count, _MIN_WIDTH_INCHES) + _ROW_NAME_INCHES, cell * len(rows) + margin)
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=size, dpi=100)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row_axes, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(row_axes, images, strict=True):
            pixels = (image if len(image) >= 3 else image[:1].expand(3, -1, -1))[:3]
            ax.imshow(pixels.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row_axes[0].set_ylabel(name, fontsize=8)
    figure.text(0.01, 0.05 / size[1], caption, fontsize=6, va="bottom", linespacing=1.3)
    figure.subplots_adjust(
        left=_ROW_NAME_INCHES / size[0],
        right=0.99,
        bottom=(margin - 0.05) / size[1],
        top=1 - 0.03 / size[1],
        wspace=0.03,
        hspace=0.03,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_loss_curve(rows: list[dict], path: Path, title: str = "") -> None:
    """Write a PNG of the training loss and the validation loss over the steps of a run.

    Args:
        rows: rows of the metrics file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), dpi=100)
    axes = figure.subplots()
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label="training", linewidth=1)
    validation = [(r["step"], r["val_loss"]) for r in rows if r.get("val_loss") is not None]
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", label="validation", markersize=3, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared error, masked patches")
    axes.legend()
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def reconstruct(config: ReconstructConfig) -> Path:
    """Draw a reconstruction panel of images from files.

    Returns:
        The path of the PNG file.

    Raises:
        UserError: if the model or an image cannot be read.
    """
    model = load_autoencoder(config.run)
    in_chans = model.config.in_chans
    batch = read_images(config.images, in_chans, model.config.image_size)
    mean, std = model.config.mean or (0.0,) * in_chans, model.config.std or (1.0,) * in_chans
    noise = make_mask_noise(model, len(batch), config.seed)
    draw_panel(model, normalize(batch, mean, std), noise, Path(config.out), Path(config.run).name)
    return Path(config.out)


def make_mask_noise(model: MaskedAutoencoder, count: int, seed: int) -> Tensor:
    """Return the mask noise of images 0, 1, …, keyed by the seed: float [count, L]."""
    return model.mask_noise(rng.uniform(seed, "mask", 0, torch.arange(count), model.num_mask_uniforms))


def read_images(
    specs: Sequence[str], channels: int, image_size: Sequence[int], max_images: int = MAX_PANEL_IMAGES
) -> Tensor:
    """Read central crops of the first images of a list of files and data sets.

    Args:
        specs: image files, or anything that ``--data`` of pretrain takes.
        channels: number of channels to which the images are converted.
        image_size: height and width to which the crops are resized.
        max_images: maximum number of images.

    Returns:
        float [B, C, *image_size] in [0, 1].

    Raises:
        UserError: if an image cannot be read, or no images are given.
    """
    pixels: list[Tensor] = []
    for spec in specs:
        path = Path(spec)
        if path.suffix.lower() in SUFFIXES and path.is_file():
            pixels.append(_decode_pixels(decode, spec, path.read_bytes(), channels))
        else:
            source = open_source(spec, channels)
            pixels += [
                _decode_pixels(source.image, source.name(i), i) for i in range(min(len(source), max_images))
            ]
    if not pixels[:max_images]:
        raise UserError("No images are given. Give image files, or anything that --data of pretrain takes.")
    return to_float(stack_images([resized_center_crop(image, image_size) for image in pixels[:max_images]]))


def _decode_pixels(read: Callable[..., DecodedImage], name: str, *arguments: object) -> Tensor:
    try:
        return read(*arguments).pixels
    except BadSampleError as error:
        raise unreadable(name, error) from None

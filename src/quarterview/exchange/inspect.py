"""Say what a run, a checkpoint or a weights file is."""

from pathlib import Path

from quarterview.exchange.weights import find_weights, load
from quarterview.model.classifier import Classifier
from quarterview.model.mae import MaskedAutoencoder
from quarterview.train.journal import Journal, metrics

_CLASSES_SHOWN = 12


def inspect(path: str, journal: Journal) -> None:
    """Show a table of what is known about a model of ours.

    Raises:
        UserError: if there is none at that path.
    """
    file, model = find_weights(path), load(path)
    config, shape = model.config, model.config.shape
    height, width = config.image_size
    rows = [
        ("weights", str(file)),
        ("model", f"{config.model}: {shape.width} wide, {shape.depth} blocks, {shape.heads} heads"),
        (
            "images",
            f"{height}×{width}, {config.in_chans} channels, {len(model.pos_embed[0]) - 1} patches of "
            f"{shape.patch_size}",
        ),
        *(_autoencoder(model) if isinstance(model, MaskedAutoencoder) else _classifier(model)),
        ("mean", _numbers(config.mean)),
        ("std", _numbers(config.std)),
    ]
    rows += _last_metrics(Path(path))
    journal.facts(path, rows)


def _autoencoder(model: MaskedAutoencoder) -> list[tuple[str, str]]:
    config = model.config
    decoder = sum(p.numel() for name, p in model.named_parameters() if _is_decoders(name))
    encoder = sum(p.numel() for p in model.parameters()) - decoder
    return [
        (
            "decoder",
            f"{config.decoder_width} wide, {config.decoder_depth} blocks, {config.decoder_heads} heads",
        ),
        ("parameters", f"encoder {encoder:,}, decoder {decoder:,}"),
        ("masks", f"{config.mask}, {config.mask_ratio:.0%} hidden, {model.kept} patches visible"),
        ("target", "pixels normalised by patch" if config.norm_pix_loss else "pixels"),
    ]


def _classifier(model: Classifier) -> list[tuple[str, str]]:
    config = model.config
    names = f": {', '.join(config.class_names[:_CLASSES_SHOWN])}" if config.class_names else ""
    more = ", …" if config.class_names and len(config.class_names) > _CLASSES_SHOWN else ""
    read = "the mean of the patch tokens" if config.pool == "mean" else "the cls token"
    return [
        ("head", f"{config.classes} classes{names}{more}, read from {read}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
    ]


def _is_decoders(name: str) -> bool:
    return name.startswith(("decoder", "mask_token"))


def _numbers(values: tuple[float, ...] | None) -> str:
    return "not recorded" if values is None else " ".join(f"{value:.4f}" for value in values)


def _last_metrics(path: Path) -> list[tuple[str, str]]:
    rows = metrics(path) if path.is_dir() else []
    if not rows:
        return []
    last = rows[-1]
    losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    held_out = f", held-out {losses[-1]:.4f}" if losses else ""
    return [
        ("trained", f"{last['step']} steps, {last['epoch']:.1f} epochs: loss {last['loss']:.4f}{held_out}")
    ]

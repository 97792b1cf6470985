"""Write the model card of an export: how to load the model, how it was trained, and its license."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from quarterview.models.classifier import Classifier
from quarterview.versions import get_quarterview_version
from quarterview.weights.export.verify import Model
from quarterview.weights.facts import ModelInfo
from quarterview.weights.preprocessing import get_preprocessing

_SPDX_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # for example Apache-2.0 or CC-BY-NC-4.0


@dataclass(frozen=True)
class FormatInfo:
    """Description of an export format for the model card."""

    name: str
    """The value of ``quarterview export --to``."""
    library: str
    """The name on the Hub of the library that loads the format (``library_name``)."""
    load_code: str
    """Python code that loads the model. FOLDER stands for the export's folder."""
    packages: tuple[str, ...] = ()
    """Packages that the export is verified with, beside torch."""
    notes: tuple[str, ...] = ()
    """Notes for users of the export, one or two sentences each."""


def make_model_card(
    model: Model,
    format_info: FormatInfo,
    info: ModelInfo,
    differences: Mapping[str, float],
    versions: Mapping[str, str],
) -> str:
    """Return the text of ``README.md``, with the YAML header that the Hub reads.

    Args:
        model: the exported model.
        format_info: the format of the export.
        info: how the model was trained.
        differences: the relative difference of each output from that of `model`, by name.
        versions: the versions of the packages that the export was verified with, by name.
    """
    parts = [
        _format_header(model, format_info, info),
        f"# {info.name or model.config.model}",
        _format_summary(model, info),
        f"## Usage\n\n```python\n{format_info.load_code}\n```",
        *(f"- {note}" for note in format_info.notes),
        "## Preprocessing\n\n" + _format_table(_list_preprocessing(model, info)),
        "## Model\n\n" + _format_table(_list_architecture(model, info)),
        "## Training\n\n" + _format_training(info),
        "## License\n\n" + _format_license(info),
        "## Verification\n\n" + _format_verification(format_info, differences, versions),
    ]
    return "\n\n".join(parts) + "\n"


def _format_header(model: Model, format_info: FormatInfo, info: ModelInfo) -> str:
    task = "image-classification" if isinstance(model, Classifier) else "image-feature-extraction"
    head: dict[str, Any] = {
        "library_name": format_info.library,
        "pipeline_tag": task,
        "tags": ["quarterview", "masked-autoencoder", "vision-transformer"],
    }
    if _SPDX_PATTERN.fullmatch(info.license):
        head["license"] = info.license.lower()
    elif info.license:
        head |= {"license": "other", "license_name": info.license}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _format_summary(model: Model, info: ModelInfo) -> str:
    num_parameters = sum(p.numel() for p in model.parameters())
    description = (
        f"A vision transformer that classifies images into {model.config.classes} classes"
        if isinstance(model, Classifier)
        else "A vision transformer pre-trained as a masked autoencoder (He et al. 2021)"
    )
    ema = " These are the moving average of the run's weights." if info.is_ema else ""
    return f"{description}: `{model.config.model}`, {num_parameters:,} parameters, by Quarterview.{ema}"


def _list_preprocessing(model: Model, info: ModelInfo) -> Iterator[tuple[str, str]]:
    preprocessing = get_preprocessing(model.config, info.crop_pct)
    height, width = preprocessing.size
    yield "size", f"{height} × {width} pixels, {preprocessing.channels} channels"
    yield (
        "crop",
        f"center crop: the largest box of that shape, its sides × {preprocessing.crop_pct:g} (crop_pct)",
    )
    yield "resize", f"{preprocessing.interpolation}, with antialiasing"
    yield "scale", "to 0…1, then (pixel − mean) / std"
    if preprocessing.recorded:
        yield "mean", " ".join(f"{value:.6g}" for value in preprocessing.mean)
        yield "std", " ".join(f"{value:.6g}" for value in preprocessing.std)
    else:
        yield (
            "mean, std",
            "not recorded with these weights; the export contains 0 and 1, which change nothing",
        )


def _list_architecture(model: Model, info: ModelInfo) -> Iterator[tuple[str, str]]:
    config, shape = model.config, model.config.shape
    yield "encoder", f"{shape.width} wide, {shape.depth} blocks, {shape.num_heads} heads"
    cls = "a cls token" if config.cls_tokens == 1 else f"{config.cls_tokens} cls tokens"
    yield (
        "patches",
        f"{shape.patch_size} × {shape.patch_size} pixels, {config.num_patches} per image, and {cls}",
    )
    yield "LayerNorm", "epsilon 1e-6"
    if isinstance(model, Classifier):
        of_cls = "the cls token" if config.cls_tokens == 1 else "the mean of the cls tokens"
        pooled = "the mean of the patch tokens" if model.config.pool == "mean" else of_cls
        yield "head", f"{model.config.classes} classes, from {pooled}"
        if model.config.class_names:
            yield "classes", ", ".join(model.config.class_names)
    elif info.has_decoder:
        mae = model.config
        size = f"{mae.decoder_width} wide, {mae.decoder_depth} blocks, {mae.decoder_heads} heads"
        yield "decoder", f"{mae.decoder}, {size}"
        predicted = f", {mae.predict_ratio:.0%} of those predicted" if mae.predict_ratio < 1 else ""
        squares = f", in squares of {mae.mask_unit} × {mae.mask_unit} patches" if mae.mask_unit > 1 else ""
        yield "masks", f"{mae.mask}{squares}, {mae.mask_ratio:.0%} masked{predicted}"
        yield "target", mae.target_description
        if mae.fused_blocks:
            yield (
                "decoder input",
                f"blocks {', '.join(map(str, mae.fused_blocks))} and the last, fused",
            )


def _format_training(info: ModelInfo) -> str:
    """Format the run and the runs that it started from, losses and accuracies, and the settings."""
    parts = [_format_table(_list_training(info))]
    if info.losses or info.accuracies:
        rows = [(name, f"{value:.4f}") for name, value in info.losses.items()]
        rows += [(name, f"{value:.1%}") for name, value in info.accuracies.items()]
        parts.append(_format_table(rows, "metric"))
    if info.settings:
        settings = yaml.safe_dump(dict(info.settings), sort_keys=False, default_flow_style=None, width=100)
        parts.append(f"The run's settings:\n\n```yaml\n{settings}```")
    return "\n\n".join(parts)


def _list_training(info: ModelInfo) -> Iterator[tuple[str, str]]:
    if info.steps is None and not info.fingerprint:
        yield "training", "not recorded with these weights"
        return
    epochs = "" if info.epochs is None else f", {info.epochs:.1f} epochs"
    yield "trained for", f"{info.steps:,} updates{epochs}" if info.steps is not None else "not recorded"
    images = "" if info.num_images is None else f", {info.num_images:,} images"
    yield "data", f"fingerprint {info.fingerprint or 'not recorded'}{images}"
    yield "started from", info.base_model or "random weights"
    if info.base_model_info is not None:
        yield from ((f"… {name}", value) for name, value in _list_training(info.base_model_info))


def _format_license(info: ModelInfo) -> str:
    if info.license:
        return f"{info.license}."
    if info.base_model:
        return (
            f"Not stated. These weights started from `{info.base_model}`, whose license is not recorded. "
            "Look it up before you publish them."
        )
    return "Not stated by the authors of these weights."


def _format_verification(
    format_info: FormatInfo, differences: Mapping[str, float], versions: Mapping[str, str]
) -> str:
    outputs = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"The written files were loaded and compared with the original model on random images, in float32 on "
        f"a CPU. Largest difference, relative to the largest value of the output: {outputs} "
        f"(Quarterview {get_quarterview_version()}, {packages}).\n\n"
        f"Written by `quarterview export RUN --to {format_info.name}`."
    )


def _format_table(rows: Any, title: str = "") -> str:
    lines = [f"| {name} | {_escape_cell(value)} |" for name, value in rows]
    return "\n".join([f"| {title} | |", "|---|---|", *lines])


def _escape_cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")

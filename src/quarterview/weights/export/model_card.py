"""The model card: what an export is, how to load it, where it comes from, and under which licence."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from quarterview.models.classifier import Classifier
from quarterview.versions import own_version
from quarterview.weights.export.verify import Model
from quarterview.weights.facts import Facts
from quarterview.weights.preprocessing import preprocessing_of

_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # such as Apache-2.0 or CC-BY-NC-4.0: one word


@dataclass(frozen=True)
class Target:
    """What a format is, as far as a card says it."""

    name: str
    """The word of ``quarterview export --to``."""
    library: str
    """The Hub's name of the library that opens it."""
    load: str
    """Lines of Python that do. FOLDER stands for the folder."""
    packages: tuple[str, ...] = ()
    """That the export was compared in, beside torch."""
    notes: tuple[str, ...] = ()
    """What one should know, a sentence or two each."""


def card(
    model: Model, target: Target, facts: Facts, differences: Mapping[str, float], versions: Mapping[str, str]
) -> str:
    """The text of ``README.md``, with the header that the Hub reads."""
    parts = [
        _header(model, target, facts),
        f"# {facts.name or model.config.model}",
        _summary(model, facts),
        f"## Load it\n\n```python\n{target.load}\n```",
        *(f"- {note}" for note in target.notes),
        "## Images\n\n" + _table(_images(model, facts)),
        "## Model\n\n" + _table(_architecture(model, facts)),
        "## Where it comes from\n\n" + _origin(facts),
        "## Licence\n\n" + _licence(facts),
        "## Checked\n\n" + _checked(target, differences, versions),
    ]
    return "\n\n".join(parts) + "\n"


def _header(model: Model, target: Target, facts: Facts) -> str:
    task = "image-classification" if isinstance(model, Classifier) else "image-feature-extraction"
    head: dict[str, Any] = {
        "library_name": target.library,
        "pipeline_tag": task,
        "tags": ["quarterview", "masked-autoencoder", "vision-transformer"],
    }
    if _SPDX.fullmatch(facts.licence):
        head["license"] = facts.licence.lower()
    elif facts.licence:
        head |= {"license": "other", "license_name": facts.licence}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _summary(model: Model, facts: Facts) -> str:
    count = sum(p.numel() for p in model.parameters())
    kind = (
        f"A vision transformer that tells {model.config.classes} classes apart"
        if isinstance(model, Classifier)
        else "A vision transformer pre-trained as a masked autoencoder (He et al. 2021)"
    )
    average = " These are the moving average of the run's weights." if facts.average else ""
    return f"{kind}: `{model.config.model}`, {count:,} parameters, by Quarterview.{average}"


def _images(model: Model, facts: Facts) -> Iterator[tuple[str, str]]:
    wanted = preprocessing_of(model.config, facts.crop_pct)
    height, width = wanted.size
    yield "size", f"{height} × {width} pixels, {wanted.channels} channels"
    yield "crop", f"the largest central box of that shape, its sides × {wanted.crop_pct:g} (crop_pct)"
    yield "resize", f"{wanted.interpolation}, with antialiasing"
    yield "scale", "to 0…1, then (pixel − mean) / std"
    if wanted.recorded:
        yield "mean", " ".join(f"{value:.6g}" for value in wanted.mean)
        yield "std", " ".join(f"{value:.6g}" for value in wanted.std)
    else:
        yield "mean, std", "not recorded with these weights; 0 and 1 are written, which change nothing"


def _architecture(model: Model, facts: Facts) -> Iterator[tuple[str, str]]:
    config, shape = model.config, model.config.shape
    yield "encoder", f"{shape.width} wide, {shape.depth} blocks, {shape.heads} heads"
    cls = "cls" if config.cls_tokens == 1 else f"{config.cls_tokens} cls tokens"
    yield "patches", f"{shape.patch_size} × {shape.patch_size} pixels, {config.patches} an image, and {cls}"
    yield "LayerNorm", "epsilon 1e-6"
    if isinstance(model, Classifier):
        of_cls = "the cls token" if config.cls_tokens == 1 else "the mean of the cls tokens"
        read = "the mean of the patch tokens" if model.config.pool == "mean" else of_cls
        yield "head", f"{model.config.classes} classes, read from {read}"
        if model.config.class_names:
            yield "classes", ", ".join(model.config.class_names)
    elif facts.decoder:
        mae = model.config
        size = f"{mae.decoder_width} wide, {mae.decoder_depth} blocks, {mae.decoder_heads} heads"
        yield "decoder", f"{mae.decoder}, {size}"
        predicted = f", {mae.predict_share:.0%} of those predicted" if mae.predict_share < 1 else ""
        squares = f", in squares of {mae.mask_unit} × {mae.mask_unit} patches" if mae.mask_unit > 1 else ""
        yield "masks", f"{mae.mask}{squares}, {mae.mask_ratio:.0%} hidden{predicted}"
        yield "target", mae.described_target
        if mae.fused_blocks:
            yield (
                "given to the decoder",
                f"blocks {', '.join(map(str, mae.fused_blocks))} and the last, fused",
            )


def _origin(facts: Facts) -> str:
    """The run and its forebears, the figures, and the settings."""
    parts = [_table(_training(facts))]
    if facts.losses or facts.accuracies:
        rows = [(name, f"{value:.4f}") for name, value in facts.losses.items()]
        rows += [(name, f"{value:.1%}") for name, value in facts.accuracies.items()]
        parts.append(_table(rows, "figure"))
    if facts.settings:
        settings = yaml.safe_dump(dict(facts.settings), sort_keys=False, default_flow_style=None, width=100)
        parts.append(f"The run's settings:\n\n```yaml\n{settings}```")
    return "\n\n".join(parts)


def _training(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.steps is None and not facts.fingerprint:
        yield "training", "not recorded with these weights"
        return
    epochs = "" if facts.epochs is None else f", {facts.epochs:.1f} epochs"
    yield "trained for", f"{facts.steps:,} updates{epochs}" if facts.steps is not None else "not recorded"
    images = "" if facts.images is None else f", {facts.images:,} images"
    yield "data", f"fingerprint {facts.fingerprint or 'not recorded'}{images}"
    yield "started from", facts.started_from or "random weights"
    if facts.start is not None:
        yield from ((f"… {name}", value) for name, value in _training(facts.start))


def _licence(facts: Facts) -> str:
    if facts.licence:
        return f"{facts.licence}."
    if facts.started_from:
        return (
            f"Not stated. These weights started from `{facts.started_from}`, whose licence is not recorded; "
            "look it up before you publish them."
        )
    return "Not stated by whoever trained these weights."


def _checked(target: Target, differences: Mapping[str, float], versions: Mapping[str, str]) -> str:
    seen = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    with_versions = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"Opened again after writing and compared with Quarterview's own forward on random images, in "
        f"float32 on a CPU. Largest difference, as a share of the output's largest number: {seen} "
        f"(Quarterview {own_version()}, {with_versions}).\n\n"
        f"Written by `quarterview export RUN --to {target.name}`."
    )


def _table(rows: Any, title: str = "") -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join([f"| {title} | |", "|---|---|", *lines])


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")

"""To one safetensors file: every weight under our names, and a header that says what it is."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

from quarterview.models.classifier import Classifier
from quarterview.models.config import ViTConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training.checkpoint import save_weights
from quarterview.weights.export.folder import staged
from quarterview.weights.export.model_card import Target
from quarterview.weights.export.verify import Exported, Model, accept, compare, outputs, versions
from quarterview.weights.facts import Facts
from quarterview.weights.loading import decoder_names, load, metadata

FILE = "model.safetensors"


def export_safetensors(model: Model, path: str | Path, facts: Facts | None = None) -> Exported:
    """Write a file that ``quarterview.load`` and every command open, and that any reader can read.

    The names of an encoder's or a classifier's weights are timm's; the header holds the
    configuration as JSON, under ``quarterview``.

    Args:
        path: of the file; one of that name is replaced.
        facts: where the weights come from; its licence goes into the header.

    Raises:
        RunError: if the file cannot be written, or its forward differs from ours.
    """
    path = Path(path)
    with staged(path.parent, path.name) as folder:
        differences = write(model, folder / path.name, facts or Facts())
    return Exported(path, differences, versions("safetensors"))


def write(model: Model, file: Path, facts: Facts) -> Mapping[str, float]:
    """Write the file, open it again and compare."""
    licence = {"license": facts.licence} if facts.licence else {}
    weights, config = dict(model.state_dict()), model.config
    if isinstance(model, MaskedAutoencoder) and not facts.decoder:
        config = ViTConfig(**{field.name: getattr(config, field.name) for field in fields(ViTConfig)})
        weights = {name: value for name, value in weights.items() if name not in decoder_names(model.config)}
    save_weights(file, weights, {**metadata(config), **licence})
    differences = compare(model, partial(outputs, load(file)))
    accept("safetensors", differences)
    return differences


def target(model: Model) -> Target:
    """What a card says of the file."""
    call, shape = ("model.encode(images)", f"{model.config.cls_tokens} + patches, width")
    if isinstance(model, Classifier):
        call, shape = ("model(images)", "classes")
    return Target(
        name="safetensors",
        library="quarterview",
        load='import quarterview as qv\n\nmodel = qv.load("FOLDER/model.safetensors")\n'
        f"found = {call}  # float [B, {shape}]",
        packages=("safetensors",),
        notes=(
            "Without Quarterview: `safetensors.torch.load_file` reads the weights, which have timm's names "
            "where timm has them; the header of the file holds the configuration as JSON.",
        ),
    )

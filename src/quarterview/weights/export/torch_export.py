"""To ``torch.export``: a program in one ``.pt2`` file that runs with torch alone."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quarterview.models.classifier import Classifier
from quarterview.weights.export.folder import staged
from quarterview.weights.export.model_card import Target
from quarterview.weights.export.verify import (
    Exported,
    Model,
    accept,
    compare,
    random_images,
    reference,
    versions,
)
from quarterview.weights.facts import Facts
from quarterview.weights.preprocessing import preprocessing_of

FILE = "model.pt2"
_EXAMPLES = 2  # one would be taken for a constant


class Graph(nn.Module):
    """What is exported: images to what `verify.outputs` names, in the same order.

    float [B, C, H, W], normalised -> of a masked autoencoder tokens [B, K + L, D] and their mean without
    cls [B, D]; of a classifier logits [B, classes].
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, Classifier):
            return (self.model(images),)
        tokens = self.model.encode(images)
        return tokens, tokens[:, self.model.config.cls_tokens :].mean(dim=1)


def names(model: Model) -> tuple[str, ...]:
    """What the outputs of `Graph` are called."""
    return ("logits",) if isinstance(model, Classifier) else ("tokens", "pooled")


def program(model: Model) -> torch.export.ExportedProgram:
    """A model's forward as a graph, for any number of images, on the CPU in float32."""
    batch = torch.export.Dim("batch", min=1)
    example = random_images(model.config, _EXAMPLES)
    with torch.no_grad(), silence():
        traced = torch.export.export(
            Graph(reference(model)).eval(), (example,), dynamic_shapes={"images": {0: batch}}
        )
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the files of this machine
    return traced


def export_torch_export(model: Model, path: str | Path, facts: Facts | None = None) -> Exported:
    """Write a ``.pt2`` file that ``torch.export.load(FILE).module()`` makes a callable of.

    It takes float32 images [B, C, H, W] for any B and returns a tuple, see `Graph`. How pictures are
    prepared is in the file, under ``quarterview.json``.

    Args:
        path: of the file; one of that name is replaced.
        facts: where the weights come from.

    Raises:
        RunError: if the file cannot be written, or its forward differs from ours.
    """
    path = Path(path)
    with staged(path.parent, path.name) as folder:
        differences = write(model, folder / path.name, facts or Facts())
    return Exported(path, differences, versions())


def write(model: Model, file: Path, facts: Facts) -> Mapping[str, float]:
    """Write the file, open it again and compare."""
    about = preprocessing_of(model.config, facts.crop_pct).as_json()
    with silence():
        torch.export.save(program(model), file, extra_files={"quarterview.json": about})
        opened = torch.export.load(file).module()
    differences = compare(model, lambda images: dict(zip(names(model), opened(images), strict=True)))
    accept("torch-export", differences)
    return differences


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without the warnings and the remarks of exporters, which are for those who write exporters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def target(model: Model) -> Target:
    """What a card says of the file."""
    return Target(
        name="torch-export",
        library="pytorch",
        load="import torch\n\n"
        'program = torch.export.load("FOLDER/model.pt2").module()\n'
        f"{', '.join(names(model))}{',' if len(names(model)) == 1 else ''} = program(images)",
        notes=(
            "Images are float32 [B, C, H, W], normalised as below, for any B.",
            "torch does not promise that other versions of it open the file; the one that wrote it is below.",
            "The graph was traced on a CPU; `torch.export.passes.move_to_device_pass` moves it.",
        ),
    )

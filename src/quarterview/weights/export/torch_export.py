"""Export with ``torch.export``: a program in one ``.pt2`` file that runs with torch alone."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quarterview.models.classifier import Classifier
from quarterview.weights.export.folder import staging_folder
from quarterview.weights.export.model_card import FormatInfo
from quarterview.weights.export.verify import (
    ExportResult,
    Model,
    check_tolerance,
    compare_outputs,
    get_package_versions,
    make_random_images,
    make_reference_model,
)
from quarterview.weights.facts import ModelInfo
from quarterview.weights.preprocessing import get_preprocessing

FILE_NAME = "model.pt2"
_EXAMPLE_BATCH_SIZE = 2  # torch.export treats a batch size of 1 as a constant


class ExportModule(nn.Module):
    """The module that is traced: a model's forward with a tuple of outputs, named by `get_output_names`.

    Normalised images, float [B, C, H, W] -> tokens [B, K + L, D] and the mean of the patch tokens [B, D] of a
    masked autoencoder; logits [B, classes] of a classifier.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, Classifier):
            return (self.model(images),)
        tokens = self.model.encode(images)
        return tokens, tokens[:, self.model.config.cls_tokens :].mean(dim=1)


def get_output_names(model: Model) -> tuple[str, ...]:
    """Return the names of the outputs of `ExportModule`."""
    return ("logits",) if isinstance(model, Classifier) else ("tokens", "pooled")


def trace_program(model: Model) -> torch.export.ExportedProgram:
    """Trace a model's forward on the CPU in float32, with a dynamic batch size."""
    batch = torch.export.Dim("batch", min=1)
    example = make_random_images(model.config, _EXAMPLE_BATCH_SIZE)
    with torch.no_grad(), suppress_output():
        traced = torch.export.export(
            ExportModule(make_reference_model(model)).eval(),
            (example,),
            dynamic_shapes={"images": {0: batch}},
        )
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return traced


def export_torch_export(model: Model, path: str | Path, info: ModelInfo | None = None) -> ExportResult:
    """Write a ``.pt2`` file for ``torch.export.load(FILE).module()``.

    The loaded module maps float32 images [B, C, H, W], for any B, to a tuple; see `ExportModule`. The file
    describes the preprocessing in its extra file ``quarterview.json``.

    Args:
        model: the model to export.
        path: the file to write; an existing one is replaced.
        info: how the model was trained; only its crop fraction is used.

    Raises:
        RunError: if the file cannot be written, or its outputs differ from those of `model`.
    """
    path = Path(path)
    with staging_folder(path.parent, path.name) as folder:
        differences = write_and_verify(model, folder / path.name, info or ModelInfo())
    return ExportResult(path, differences, get_package_versions())


def write_and_verify(model: Model, file: Path, info: ModelInfo) -> Mapping[str, float]:
    """Write the file, open it again, and return the largest difference of each output."""
    preprocessing = get_preprocessing(model.config, info.crop_pct).to_json()
    with suppress_output():
        torch.export.save(trace_program(model), file, extra_files={"quarterview.json": preprocessing})
        opened = torch.export.load(file).module()
    names = get_output_names(model)
    differences = compare_outputs(model, lambda images: dict(zip(names, opened(images), strict=True)))
    check_tolerance("torch-export", differences)
    return differences


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress warnings and standard output of exporters, which concern their developers only."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def describe_format(model: Model) -> FormatInfo:
    """Return the model card's description of the format."""
    names = get_output_names(model)
    return FormatInfo(
        name="torch-export",
        library="pytorch",
        load_code="import torch\n\n"
        'program = torch.export.load("FOLDER/model.pt2").module()\n'
        f"{', '.join(names)}{',' if len(names) == 1 else ''} = program(images)",
        notes=(
            "Images are float32 [B, C, H, W], normalised as below, for any B.",
            "PyTorch does not guarantee that other versions open the file; see the version below.",
            "The graph was traced on a CPU. To move it, use `torch.export.passes.move_to_device_pass`.",
        ),
    )

"""Export to ONNX with a dynamic batch size, and verify in ONNX Runtime."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarterview.errors import missing_package
from quarterview.models.classifier import Classifier
from quarterview.versions import get_quarterview_version
from quarterview.weights.export.folder import staging_folder
from quarterview.weights.export.model_card import FormatInfo
from quarterview.weights.export.torch_export import get_output_names, suppress_output, trace_program
from quarterview.weights.export.verify import (
    ExportResult,
    Model,
    check_tolerance,
    compare_outputs,
    get_package_versions,
)
from quarterview.weights.facts import ModelInfo
from quarterview.weights.preprocessing import get_preprocessing

FILE_NAME = "model.onnx"
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_MAX_SINGLE_FILE_BYTES = 1_900_000_000
"""Larger weights are written to a second file beside the graph, because Protobuf is limited to 2 GiB."""


def export_onnx(model: Model, path: str | Path, info: ModelInfo | None = None) -> ExportResult:
    """Write an ONNX file with the input ``images``, float32 [B, C, H, W], for any batch size B.

    The outputs of a masked autoencoder are ``tokens`` [B, K + L, D] (K cls tokens, then L patch tokens) and
    ``pooled`` [B, D], the mean of the patch tokens; the output of a classifier is ``logits`` [B, classes].
    The model's metadata describe the preprocessing. Weights of more than 1.9 GB are written to a second file,
    ``NAME.data``.

    Args:
        model: the model to export.
        path: the file to write; an existing one is replaced.
        info: how the model was trained; fingerprint and license are written to the metadata.

    Raises:
        UserError: if a package of the extra ``quarterview[onnx]`` is not installed.
        RunError: if the file cannot be written, or its outputs in ONNX Runtime differ from those of `model`.
    """
    path = Path(path)
    check_packages()
    with staging_folder(path.parent, path.name) as folder:
        differences = write_and_verify(model, folder / path.name, info or ModelInfo())
    return ExportResult(path, differences, get_package_versions(*_PACKAGES))


def check_packages() -> None:
    """Check that the packages of the extra ``quarterview[onnx]`` are installed; raise UserError if not."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_package(error.name or "onnx", "--to onnx", "onnx") from None


def write_and_verify(model: Model, file: Path, info: ModelInfo) -> Mapping[str, float]:
    """Write the file, run it in ONNX Runtime, and return the largest difference of each output."""
    num_bytes = sum(p.numel() for p in model.parameters()) * torch.float32.itemsize
    with suppress_output():
        onnx_program: Any = torch.onnx.export(
            trace_program(model),
            dynamo=True,
            input_names=["images"],
            output_names=list(get_output_names(model)),
            dynamic_shapes={"images": {0: "batch"}},  # the name of the axis
            verbose=False,
        )
        onnx_program.model.metadata_props.update(_make_metadata(model, info))
        for node in onnx_program.model.graph:
            node.metadata_props.clear()  # stack traces with paths of this machine
        onnx_program.save(str(file), external_data=num_bytes > _MAX_SINGLE_FILE_BYTES)
    differences = _compare_with_onnxruntime(model, file)
    check_tolerance("onnx", differences)
    return differences


def _make_metadata(model: Model, info: ModelInfo) -> dict[str, str]:
    preprocessing = get_preprocessing(model.config, info.crop_pct)
    metadata: dict[str, Any] = {
        "quarterview": get_quarterview_version(),
        "model": model.config.model,
        "size": list(preprocessing.size),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_pct,
        "preparation": "crop the central box, resize, scale to 0…1, then (pixel - mean) / std",
    }
    if isinstance(model, Classifier) and model.config.class_names:
        metadata["class_names"] = list(model.config.class_names)
    if info.fingerprint:
        metadata["data"] = info.fingerprint
    if info.license:
        metadata["license"] = info.license
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}


def _compare_with_onnxruntime(model: Model, file: Path) -> dict[str, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    names = list(get_output_names(model))

    def run_exported(images: Tensor) -> Mapping[str, Tensor]:
        values = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return compare_outputs(model, run_exported)


def describe_format(model: Model) -> FormatInfo:
    """Return the model card's description of the format."""
    names = get_output_names(model)
    outputs = f"{', '.join(names)}{',' if len(names) == 1 else ''}"
    return FormatInfo(
        name="onnx",
        library="onnx",
        load_code="import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        f'{outputs} = session.run(None, {{"images": images}})  # NumPy, float32 [B, C, H, W]',
        packages=_PACKAGES,
        notes=(
            "B is any batch size. `session.get_modelmeta().custom_metadata_map` describes the preprocessing: "
            "size, mean, std, interpolation, crop_pct.",
        ),
    )

"""To ONNX, for any number of images, checked in ONNX Runtime."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarterview.errors import UserError
from quarterview.models.classifier import Classifier
from quarterview.versions import own_version
from quarterview.weights.export.folder import staged
from quarterview.weights.export.model_card import Target
from quarterview.weights.export.torch_export import names, program, silence
from quarterview.weights.export.verify import Exported, Model, accept, compare, versions
from quarterview.weights.facts import Facts
from quarterview.weights.preprocessing import preprocessing_of

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_ONE_FILE = 1_900_000_000
"""Bytes of weights beyond which they lie in a file beside the graph: Protobuf ends at 2 GiB."""


def export_onnx(model: Model, path: str | Path, facts: Facts | None = None) -> Exported:
    """Write an ONNX file with the input ``images``, float32 [B, C, H, W], for any B.

    The outputs are, of a masked autoencoder, ``tokens`` [B, K + L, D] (K of cls, then the patches) and
    ``pooled`` [B, D], the mean of the patches' tokens; of a classifier ``logits`` [B, classes]. How
    pictures are prepared is in the model's metadata. Weights of more than 1.9 GB go into a second
    file, ``NAME.data``.

    Args:
        path: of the file; one of that name is replaced.
        facts: where the weights come from; fingerprint and licence go into the metadata.

    Raises:
        UserError: if a package of the extra ``quarterview[onnx]`` is not installed.
        RunError: if the file cannot be written, or its forward in ONNX Runtime differs from ours.
    """
    path = Path(path)
    check_installed()
    with staged(path.parent, path.name) as folder:
        differences = write(model, folder / path.name, facts or Facts())
    return Exported(path, differences, versions(*PACKAGES))


def check_installed() -> None:
    """Raises UserError unless everything that an export to ONNX takes is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"exporting to onnx needs {error.name}: pip install 'quarterview[onnx]'") from None


def write(model: Model, file: Path, facts: Facts) -> Mapping[str, float]:
    """Write the file, open it again in ONNX Runtime and compare."""
    size = sum(p.numel() for p in model.parameters()) * torch.float32.itemsize
    with silence():
        made: Any = torch.onnx.export(
            program(model),
            dynamo=True,
            input_names=["images"],
            output_names=list(names(model)),
            dynamic_shapes={"images": {0: "batch"}},  # gives the axis its name
            verbose=False,
        )
        made.model.metadata_props.update(_metadata(model, facts))
        for node in made.model.graph:
            node.metadata_props.clear()  # it names the files of this machine
        made.save(str(file), external_data=size > _ONE_FILE)
    differences = _compare(model, file)
    accept("onnx", differences)
    return differences


def _metadata(model: Model, facts: Facts) -> dict[str, str]:
    wanted = preprocessing_of(model.config, facts.crop_pct)
    about: dict[str, Any] = {
        "quarterview": own_version(),
        "model": model.config.model,
        "size": list(wanted.size),
        "mean": list(wanted.mean),
        "std": list(wanted.std),
        "interpolation": wanted.interpolation,
        "crop_pct": wanted.crop_pct,
        "preparation": "crop the central box, resize, scale to 0…1, then (pixel - mean) / std",
    }
    if isinstance(model, Classifier) and model.config.class_names:
        about["class_names"] = list(model.config.class_names)
    if facts.fingerprint:
        about["data"] = facts.fingerprint
    if facts.licence:
        about["license"] = facts.licence
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in about.items()}


def _compare(model: Model, file: Path) -> dict[str, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def theirs(images: Tensor) -> Mapping[str, Tensor]:
        found = session.run(list(names(model)), {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names(model), found, strict=True)}

    return compare(model, theirs)


def target(model: Model) -> Target:
    """What a card says of the file."""
    outputs = f"{', '.join(names(model))}{',' if len(names(model)) == 1 else ''}"
    return Target(
        name="onnx",
        library="onnx",
        load="import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        f'{outputs} = session.run(None, {{"images": images}})  # NumPy, float32 [B, C, H, W]',
        packages=PACKAGES,
        notes=(
            "Any B. `session.get_modelmeta().custom_metadata_map` says how pictures are prepared: "
            "size, mean, std, interpolation, crop_pct.",
        ),
    )

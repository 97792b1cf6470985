"""Export to Hugging Face transformers.

The weights are not written by ``save_pretrained``: transformers 5.23 gives the decoder's blocks names
(``decoder.decoder_encoder.layer.0…``) that transformers 4 does not know and leaves random. This module writes
the names of the checkpoints on the Hub, which both versions read.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from quarterview import rng
from quarterview.errors import RunError, UserError, missing_package, unknown
from quarterview.models.classifier import Classifier
from quarterview.models.config import MAEConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import LAYER_NORM_EPS, MLP_RATIO
from quarterview.training.checkpoint import save_weights
from quarterview.weights.config import TransformersPart
from quarterview.weights.export.folder import write_folder
from quarterview.weights.export.model_card import FormatInfo
from quarterview.weights.export.timm import is_supported_by_timm
from quarterview.weights.export.verify import (
    BATCH_SIZES,
    ExportResult,
    Model,
    check_tolerance,
    compare_outputs,
    compute_relative_difference,
    make_random_images,
    make_reference_model,
)
from quarterview.weights.facts import ModelInfo
from quarterview.weights.preprocessing import get_preprocessing, to_transformers_config

_TRANSFORMERS_NAMES = {  # outside the blocks
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_STACK_NAMES = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_CLASS_NAMES = {"mae": "ViTMAEForPreTraining", "vit": "ViTModel", "classifier": "ViTForImageClassification"}


def export_transformers(
    model: Model,
    folder: str | Path,
    info: ModelInfo | None = None,
    parts: Sequence[TransformersPart] | None = None,
) -> ExportResult:
    """Write a folder with a sub-folder for each model class of transformers that supports the model.

    ``mae/`` is for ``ViTMAEForPreTraining``, ``vit/`` for ``ViTModel``, and ``classifier/`` for
    ``ViTForImageClassification`` (only classifiers that read the cls token). ``layer_norm_eps`` is 1e-6, the
    position embeddings are included, and each sub-folder has a ``preprocessor_config.json``.

    Args:
        model: the model to export.
        folder: new, empty, or an earlier export.
        info: how the model was trained, for the model card.
        parts: the sub-folders to write; by default ``mae`` and ``vit``, or ``classifier`` and ``vit``.

    Raises:
        UserError: if transformers does not support a part, or is not installed (the extra
            ``quarterview[transformers]``), or the folder contains other files.
        RunError: if the outputs in transformers differ from those of `model`. Nothing is then written.
    """
    parts = tuple(get_default_parts(model) if parts is None else dict.fromkeys(parts))
    check_supported(model, parts)
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise missing_package("transformers", "--to transformers", "transformers") from None
    info = info or ModelInfo()
    write = partial(_write_and_verify, model, info, parts)
    return write_folder(model, folder, info, describe_format(model, parts), write)


def get_default_parts(model: Model) -> tuple[TransformersPart, ...]:
    """Return the parts that are exported by default."""
    return ("classifier", "vit") if isinstance(model, Classifier) else ("mae", "vit")


# ---------------------------------------------------------------------- supported models


def check_supported(model: Model, parts: Sequence[str]) -> None:
    """Check that transformers supports some parts of a model; raise UserError if not."""
    for part in parts:
        if part not in get_args(TransformersPart):
            raise unknown("part", part, get_args(TransformersPart))
    if not parts:
        raise UserError(f"No part to export is given. Give --parts {' '.join(get_default_parts(model))}.")
    for part in parts:
        unsupported = list(_list_unsupported(model, part))
        if unsupported:
            raise UserError(
                f"{_CLASS_NAMES[part]} of transformers does not support {' or '.join(unsupported)}. "
                f"{_suggest_alternatives(model)}"
            )


def _list_unsupported(model: Model, part: str) -> Iterator[str]:
    """Yield the properties of a model that the transformers class of a part does not support."""
    if model.config.cls_tokens > 1:
        yield f"{model.config.cls_tokens} cls tokens (only one)"
    if isinstance(model, Classifier):
        if part == "mae":
            yield "a fine-tuned classifier, which has no decoder"
        elif model.config.pool == "mean":
            yield "a head that reads the mean of the patch tokens (it reads the cls token)"
        return
    if part == "classifier":
        yield "a masked autoencoder, which has no head"
    if part == "mae":
        yield from _list_unsupported_by_mae(model.config)


def _list_unsupported_by_mae(config: MAEConfig) -> Iterator[str]:
    if config.image_size[0] != config.image_size[1]:
        yield f"images of {config.image_size[0]} × {config.image_size[1]} pixels (only square ones)"
    if config.encoder_mask_tokens:
        yield "mask tokens in the encoder"
    if config.decoder == "cross":
        yield "a cross-attention decoder"
    if config.fused_blocks:
        yield "a decoder with fused blocks"
    if config.decoder_depth == 0:
        yield "a decoder without blocks"
    if config.predict_all:
        yield "predictions of visible patches"
    if config.target != "pixels":
        yield f"predictions of {config.target_description}"
    if config.mask != "random" or config.mask_unit > 1:
        squares = " of squares" if config.mask_unit > 1 else ""
        yield f"{config.mask} masks{squares} (only random ones)"


def _suggest_alternatives(model: Model) -> str:
    """Return a sentence with the parts and formats that support a model."""
    parts = [name for name in get_args(TransformersPart) if not any(_list_unsupported(model, name))]
    formats = "onnx, torch-export or safetensors"
    if is_supported_by_timm(model):
        formats = f"timm, {formats}"
    use_parts = f"Use --parts {' or '.join(parts)}, or" if parts else "Use"
    return f"{use_parts} --to {formats}."


# ---------------------------------------------------------------------- writing


def _write_and_verify(
    model: Model, info: ModelInfo, parts: Sequence[TransformersPart], folder: Path
) -> Mapping[str, float]:
    differences = dict[str, float]()
    preprocessor_config = to_transformers_config(get_preprocessing(model.config, info.crop_pct))
    for part in parts:
        part_folder = folder / part
        part_folder.mkdir()
        save_weights(part_folder / "model.safetensors", rename_weights(model, part), {"format": "pt"})
        config = _make_config(model, part)
        config.architectures = [_CLASS_NAMES[part]]
        text = json.dumps(preprocessor_config, indent=1) + "\n"
        (part_folder / "preprocessor_config.json").write_text(text, "utf-8")
        with _suppress_logging():
            config.save_pretrained(part_folder)
            if part == "mae":
                part_differences = _compare_mae_outputs(model, part_folder)
            else:
                part_differences = _compare_part_outputs(model, part_folder, part)
        differences |= {f"{part}: {name}": value for name, value in part_differences.items()}
    check_tolerance("transformers", differences)
    return differences


def _make_config(model: Model, part: TransformersPart) -> Any:
    from transformers import ViTConfig, ViTMAEConfig

    config, shape = model.config, model.config.shape
    height, width = config.image_size
    encoder: dict[str, Any] = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": MLP_RATIO * shape.width,
        "image_size": height if height == width else [height, width],
        "patch_size": shape.patch_size,
        "num_channels": config.in_chans,
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    if part == "classifier" and isinstance(model, Classifier):
        names = model.config.class_names or [f"LABEL_{i}" for i in range(model.config.classes)]
        encoder["id2label"] = dict(enumerate(names))
        encoder["label2id"] = {name: i for i, name in enumerate(names)}
    if part != "mae" or not isinstance(model, MaskedAutoencoder):
        return ViTConfig(**encoder)
    return ViTMAEConfig(
        **encoder,
        decoder_hidden_size=model.config.decoder_width,
        decoder_num_hidden_layers=model.config.decoder_depth,
        decoder_num_attention_heads=model.config.decoder_heads,
        decoder_intermediate_size=MLP_RATIO * model.config.decoder_width,
        mask_ratio=model.config.mask_ratio,
        norm_pix_loss=model.config.norm_pix_loss,
    )


def rename_weights(model: Model, part: TransformersPart) -> dict[str, Tensor]:
    """Return the weights of one part under the names of transformers' checkpoints on the Hub."""
    excluded = () if part == "mae" else ("decoder", "mask_token", "target.")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(excluded)}
    renamed = dict(item for name, value in weights.items() for item in _rename_tensor(name, value))
    if part == "vit":
        return {name.removeprefix("vit."): v for name, v in renamed.items() if name.startswith("vit.")}
    return renamed


def _rename_tensor(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor under its name in transformers; query, key and value of a qkv tensor separately."""
    block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        stem, _, leaf = name.rpartition(".")
        names = _TRANSFORMERS_NAMES
        yield names[name] if name in names else f"{names[stem]}.{leaf}", value
        return
    stack, index, part, leaf = block.groups()
    prefix = f"{_STACK_NAMES[stack]}.{index}"
    if part != "attn.qkv":
        yield f"{prefix}.{_BLOCK_NAMES[part]}.{leaf}", value
        return
    for projection, chunk in zip(("query", "key", "value"), torch.chunk(value, 3), strict=True):
        yield f"{prefix}.attention.attention.{projection}.{leaf}", chunk.contiguous()


# ---------------------------------------------------------------------- verification


def _load_exported(folder: Path, part: str, **options: Any) -> Any:
    """Load a part with transformers, and check that no weight is missing, unexpected or of another shape."""
    import transformers

    model_class = getattr(transformers, _CLASS_NAMES[part])
    model, loading_info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading_info[problem]:
            raise RunError(
                f"{_CLASS_NAMES[part]} of transformers {transformers.__version__} reports {problem}: "
                f"{', '.join(sorted(map(str, loading_info[problem])))}. Try another version of transformers."
            )
    return model.eval()


def _compare_part_outputs(model: Model, folder: Path, part: str) -> dict[str, float]:
    """Return the relative differences of the logits of a classifier, or of the tokens of an encoder."""
    if part == "classifier":
        classifier = _load_exported(folder, part)
        return compare_outputs(model, lambda images: {"logits": classifier(images).logits})
    vit = _load_exported(folder, part, add_pooling_layer=False)
    return compare_outputs(model, lambda images: {"tokens": vit(images).last_hidden_state})


@torch.no_grad()
def _compare_mae_outputs(model: Model, folder: Path) -> dict[str, float]:
    """Return the largest relative differences of loss and predictions, with the same mask noise."""
    reference, exported = make_reference_model(model), _load_exported(folder, "mae")
    assert isinstance(reference, MaskedAutoencoder)
    differences = {"loss": 0.0, "predictions": 0.0}
    for batch_size in BATCH_SIZES:
        images = make_random_images(model.config, batch_size)
        with rng.seeded(0, "verify an export's masks", batch_size):
            noise = torch.rand(batch_size, reference.config.num_patches)
        expected, actual = reference(images, noise=noise), exported(images, noise=noise)
        predictions = actual.logits[expected.mask].view_as(expected.pred)  # both in ascending patch order
        for name, difference in (
            ("loss", compute_relative_difference(expected.loss, actual.loss)),
            ("predictions", compute_relative_difference(expected.pred, predictions)),
        ):
            differences[name] = max(differences[name], difference)
    return differences


@contextlib.contextmanager
def _suppress_logging() -> Iterator[None]:
    """Suppress progress bars and messages of transformers below level ERROR during verification."""
    import transformers

    logging = transformers.logging
    level, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_progress_bar:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------- model card


def describe_format(model: Model, parts: Sequence[str]) -> FormatInfo:
    """Return the model card's description of the format."""
    lines = {
        "mae": 'model = ViTMAEForPreTraining.from_pretrained("FOLDER/mae")  # loss, predictions',
        "vit": 'model = ViTModel.from_pretrained("FOLDER/vit", add_pooling_layer=False)  # last_hidden_state',
        "classifier": 'model = ViTForImageClassification.from_pretrained("FOLDER/classifier")  # logits',
    }
    names = ", ".join(["AutoImageProcessor", *(_CLASS_NAMES[part] for part in parts)])
    processor = f'processor = AutoImageProcessor.from_pretrained("FOLDER/{parts[0]}")'
    imports = f"from transformers import {names}\n"
    return FormatInfo(
        name="transformers",
        library="transformers",
        load_code="\n".join([imports, processor, *(lines[part] for part in parts)]),
        packages=("transformers",),
        notes=(
            "To load from the Hub, name the sub-folder: "
            f'`{_CLASS_NAMES[parts[0]]}.from_pretrained("OWNER/NAME", subfolder="{parts[0]}")`.',
            "`ViTImageProcessor` resizes the whole image. If images have another aspect ratio, apply the "
            "center crop described below first.",
            *(
                ("Without `add_pooling_layer=False`, `ViTModel` has a randomly initialised pooler.",)
                if "vit" in parts
                else ()
            ),
            *(
                (
                    "transformers 5 makes the fixed position embeddings trainable when it loads this model. "
                    "Set `requires_grad` of `vit.embeddings.position_embeddings` and "
                    "`decoder.decoder_pos_embed` to False before you continue training.",
                )
                if "mae" in parts
                else ()
            ),
        ),
    )

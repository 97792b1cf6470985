"""To Hugging Face transformers.

The files are written here, not by ``save_pretrained``: transformers 5.23 gives a decoder's blocks names
(``decoder.decoder_encoder.layer.0…``) that transformers 4 does not know and leaves random. Ours are
those of the checkpoints on the Hub, which both generations open.
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
from quarterview.errors import RunError, UserError, unknown
from quarterview.models.classifier import Classifier
from quarterview.models.config import MAEConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import LAYER_NORM_EPS, MLP_RATIO
from quarterview.training.checkpoint import save_weights
from quarterview.weights.config import TransformersPart
from quarterview.weights.export.folder import write_folder
from quarterview.weights.export.model_card import Target
from quarterview.weights.export.timm import timm_holds
from quarterview.weights.export.verify import (
    BATCHES,
    Exported,
    Model,
    accept,
    compare,
    difference,
    random_images,
    reference,
)
from quarterview.weights.facts import Facts
from quarterview.weights.preprocessing import for_transformers, preprocessing_of

_NAMES = {
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
_STACKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
_IN_A_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_CLASSES = {"mae": "ViTMAEForPreTraining", "vit": "ViTModel", "classifier": "ViTForImageClassification"}


def export_transformers(
    model: Model,
    folder: str | Path,
    facts: Facts | None = None,
    parts: Sequence[TransformersPart] | None = None,
) -> Exported:
    """Write a folder with a sub-folder for each class of transformers that can hold the model.

    ``mae/`` is for ``ViTMAEForPreTraining``, ``vit/`` for ``ViTModel`` and, of a classifier that reads
    the cls token, ``classifier/`` for ``ViTForImageClassification``. The LayerNorm epsilon is 1e-6, the
    position tables are filled, and each has a ``preprocessor_config.json``.

    Args:
        facts: where the weights come from, for the card.
        parts: which of them; by default ``mae`` and ``vit``, or ``classifier`` and ``vit``.

    Raises:
        UserError: if transformers cannot hold a part, or is not installed (the extra
            ``quarterview[transformers]``), or the folder holds something else.
        RunError: if transformers' forward differs from ours; then nothing is written.
    """
    parts = tuple(default_parts(model) if parts is None else dict.fromkeys(parts))
    check_expressible(model, parts)
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            "exporting to transformers needs it: pip install 'quarterview[transformers]'"
        ) from None
    facts = facts or Facts()
    return write_folder(model, folder, facts, target(model, parts), partial(_write, model, facts, parts))


def default_parts(model: Model) -> tuple[TransformersPart, ...]:
    """The parts of an export where none are named."""
    return ("classifier", "vit") if isinstance(model, Classifier) else ("mae", "vit")


# ---------------------------------------------------------------------- what transformers can hold


def check_expressible(model: Model, parts: Sequence[str]) -> None:
    """Raises UserError unless transformers can hold these parts of a model."""
    for part in parts:
        if part not in get_args(TransformersPart):
            raise unknown("part", part, get_args(TransformersPart))
    if not parts:
        raise UserError(f"no part to export; accepted: {' '.join(default_parts(model))}")
    for part in parts:
        broken = list(_limits(model, part))
        if broken:
            raise UserError(
                f"transformers' {_CLASSES[part]} cannot hold {' or '.join(broken)}; accepted: "
                f"{_way_out(model, part)}"
            )


def _limits(model: Model, part: str) -> Iterator[str]:
    """What a class of transformers cannot hold of a model, by name."""
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
        yield from _limits_of_pretraining(model.config)


def _limits_of_pretraining(config: MAEConfig) -> Iterator[str]:
    if config.image_size[0] != config.image_size[1]:
        yield f"a {config.image_size} image (only squares)"
    if config.encoder_mask_tokens:
        yield "mask tokens in the encoder"
    if config.decoder == "cross":
        yield "a cross-attention decoder"
    if config.fused_blocks:
        yield "a decoder that is given fused blocks"
    if config.decoder_depth == 0:
        yield "a decoder without blocks"
    if config.predict_all:
        yield "predictions of visible patches"
    if config.target != "pixels":
        yield f"predictions of {config.described_target}"
    if config.mask != "random" or config.mask_unit > 1:
        squares = " of squares" if config.mask_unit > 1 else ""
        yield f"{config.mask} masks{squares} (only random ones)"


def _way_out(model: Model, part: str) -> str:
    holds = [name for name in get_args(TransformersPart) if name != part and not any(_limits(model, name))]
    others = "onnx, torch-export or safetensors"
    if timm_holds(model):
        others = f"timm, {others}"
    return f"the part {' or '.join(holds)}, or {others}" if holds else others


# ---------------------------------------------------------------------- writing


def _write(
    model: Model, facts: Facts, parts: Sequence[TransformersPart], folder: Path
) -> Mapping[str, float]:
    differences = dict[str, float]()
    wanted = for_transformers(preprocessing_of(model.config, facts.crop_pct))
    for part in parts:
        there = folder / part
        there.mkdir()
        save_weights(there / "model.safetensors", renamed(model, part), {"format": "pt"})
        config = _config(model, part)
        config.architectures = [_CLASSES[part]]
        (there / "preprocessor_config.json").write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")
        with _quiet():
            config.save_pretrained(there)
            compared = _compare_mae(model, there) if part == "mae" else _compare(model, there, part)
        differences |= {f"{part}: {name}": value for name, value in compared.items()}
    accept("transformers", differences)
    return differences


def _config(model: Model, part: TransformersPart) -> Any:
    from transformers import ViTConfig, ViTMAEConfig

    config, shape = model.config, model.config.shape
    height, width = config.image_size
    encoder: dict[str, Any] = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
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


def renamed(model: Model, part: TransformersPart) -> dict[str, Tensor]:
    """The weights of one part under the names of transformers' checkpoints."""
    left = () if part == "mae" else ("decoder", "mask_token", "target.")
    ours = {name: value for name, value in model.state_dict().items() if not name.startswith(left)}
    theirs = dict(item for name, value in ours.items() for item in _rename(name, value))
    if part == "vit":
        return {name.removeprefix("vit."): v for name, v in theirs.items() if name.startswith("vit.")}
    return theirs


def _rename(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        stem, _, leaf = name.rpartition(".")
        yield (_NAMES[name], value) if name in _NAMES else (f"{_NAMES[stem]}.{leaf}", value)
        return
    stack, index, part, leaf = block.groups()
    prefix = f"{_STACKS[stack]}.{index}"
    if part != "attn.qkv":
        yield f"{prefix}.{_IN_A_BLOCK[part]}.{leaf}", value
        return
    for which, third in zip(("query", "key", "value"), torch.chunk(value, 3), strict=True):
        yield f"{prefix}.attention.attention.{which}.{leaf}", third.contiguous()


# ---------------------------------------------------------------------- opening again


def _open(folder: Path, part: str, **options: Any) -> Any:
    """What transformers makes of a part, once it has said that every weight is in its place."""
    import transformers

    kind = getattr(transformers, _CLASSES[part])
    theirs, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise RunError(
                f"{_CLASSES[part]} of transformers {transformers.__version__} reports "
                f"{problem.replace('_', ' ')}: {', '.join(sorted(map(str, info[problem])))}"
            )
    return theirs.eval()


def _compare(model: Model, folder: Path, part: str) -> dict[str, float]:
    if part == "classifier":
        classifier = _open(folder, part)
        return compare(model, lambda images: {"logits": classifier(images).logits})
    vit = _open(folder, part, add_pooling_layer=False)
    return compare(model, lambda images: {"tokens": vit(images).last_hidden_state})


@torch.no_grad()
def _compare_mae(model: Model, folder: Path) -> dict[str, float]:
    """The largest differences of the loss and of the predictions, with the same noise."""
    ours, theirs = reference(model), _open(folder, "mae")
    assert isinstance(ours, MaskedAutoencoder)
    found = {"loss": 0.0, "predictions": 0.0}
    for count in BATCHES:
        images = random_images(model.config, count)
        with rng.seeded(0, "verify an export's masks", count):
            noise = torch.rand(count, ours.config.patches)
        expected, seen = ours(images, noise=noise), theirs(images, noise=noise)
        predictions = seen.logits[expected.mask].view_as(expected.pred)  # ascending, as ours
        found["loss"] = max(found["loss"], difference(expected.loss, seen.loss))
        found["predictions"] = max(found["predictions"], difference(expected.pred, predictions))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and notes, which would tell of the check and not of the export."""
    import transformers

    logging = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------- the card


def target(model: Model, parts: Sequence[str]) -> Target:
    """What a card says of an export to transformers."""
    lines = {
        "mae": 'model = ViTMAEForPreTraining.from_pretrained("FOLDER/mae")  # loss, predictions',
        "vit": 'model = ViTModel.from_pretrained("FOLDER/vit", add_pooling_layer=False)  # last_hidden_state',
        "classifier": 'model = ViTForImageClassification.from_pretrained("FOLDER/classifier")  # logits',
    }
    names = ", ".join(["AutoImageProcessor", *(_CLASSES[part] for part in parts)])
    processor = f'processor = AutoImageProcessor.from_pretrained("FOLDER/{parts[0]}")'
    return Target(
        name="transformers",
        library="transformers",
        load="\n".join([f"from transformers import {names}\n", processor, *(lines[part] for part in parts)]),
        packages=("transformers",),
        notes=(
            "From the Hub, name the sub-folder: "
            f'`{_CLASSES[parts[0]]}.from_pretrained("OWNER/NAME", subfolder="{parts[0]}")`.',
            "`ViTImageProcessor` resizes the whole picture; cut out the central box first, as below, where "
            "pictures have another shape.",
            *(
                ("The pooler of a `ViTModel` without `add_pooling_layer=False` would be random.",)
                if "vit" in parts
                else ()
            ),
            *(
                (
                    "transformers 5 makes the fixed position tables trainable when it opens this; set "
                    "`requires_grad` of `vit.embeddings.position_embeddings` and `decoder.decoder_pos_embed` "
                    "to false before you go on training.",
                )
                if "mae" in parts
                else ()
            ),
        ),
    )

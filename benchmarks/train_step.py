"""Speed of an MAE training step compared with other libraries on the same arithmetic.

A step is forward, backward and AdamW. Each library runs in its own process, as its users run it, eager and
compiled; the processes take turns:

- quarterview: the model, training step and allocator settings of this package;
- transformers: ViTMAEForPreTraining;
- lightly: MaskedVisionTransformerTIMM and MAEDecoderTIMM, combined as in its documentation;
- stable-pretraining: its MAE, whose decoder does not receive the cls token.

First, the weights of quarterview are copied into each library, which must compute the same loss in float32
for the same mask noise (for the last one, the loss without the cls token in the decoder). For the timing,
each library draws its own masks, as documented. All use fused AdamW, which is faster than the default in
their documentation. The matrix-product rate of the machine is measured in every round. `--kept-memory` gives
the other libraries the allocator settings of quarterview, too.

    uv run --group bench python benchmarks/train_step.py --out docs/results/train_step_bf16.json
    uv run --group bench python benchmarks/train_step.py --precision fp32
    uv run --group bench python benchmarks/train_step.py --model mae_vit_tiny_patch4 --image-size 32 \
        --decoder 128 2 4 --batch 256
"""

import json
import resource
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
import tyro
from torch import Tensor, nn

from quarterview.benchmark.rate import list_matrix_products, measure_flops_per_s, time_once
from quarterview.data.loader import Batch
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.models.config import MAEConfig
from quarterview.models.flops import count_flops
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import compute_patch_statistics
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.distributed import World
from quarterview.training.optim import create_adamw
from quarterview.training.record import collect_provenance
from quarterview.training.step import TrainStep
from quarterview.training.trainer import get_autocast_context
from quarterview.weights import export_transformers

Peer = Literal["transformers", "lightly", "stable-pretraining"]
OWN_NAME = "quarterview"


class Competitor(NamedTuple):
    """A model of a library, with two functions that compute its loss."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    """Loss of images, with masks that the library draws."""
    loss_with_noise: Callable[[Tensor, Tensor], Tensor]
    """Loss of images with given mask noise [N, L]."""


def create_transformers_peer(ours: MaskedAutoencoder) -> Competitor:
    """Create the MAE of transformers with the weights of quarterview."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        export_transformers(ours, folder)
        model = transformers.ViTMAEForPreTraining.from_pretrained(Path(folder) / "mae")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("position_embeddings" not in name and "pos_embed" not in name)
    return Competitor(
        model, lambda images: model(images).loss, lambda images, noise: model(images, noise=noise).loss
    )


class LightlyMAE(nn.Module):
    """The training step of lightly's documentation, with normalized targets as in the MAE paper."""

    def __init__(self, ours: MaskedAutoencoder) -> None:
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        config, shape = ours.config, ours.config.shape
        vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=shape.patch_size,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.num_heads,
            num_classes=0,
        )
        self.mask_ratio, self.patch_size = config.mask_ratio, shape.patch_size
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.sequence_length = self.backbone.sequence_length
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=shape.patch_size,
            embed_dim=shape.width,
            decoder_embed_dim=config.decoder_width,
            decoder_depth=config.decoder_depth,
            decoder_num_heads=config.decoder_heads,
        )
        weights = ours.state_dict()
        encoder = {k: v for k, v in weights.items() if "decoder" not in k and k != "mask_token"}
        vit.load_state_dict(encoder)
        self.decoder.load_state_dict({k: v for k, v in weights.items() if k not in encoder})
        vit.pos_embed.requires_grad_(False)
        self.backbone.mask_token.requires_grad_(False)  # it is not used

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        from lightly.models import utils

        if noise is None:
            kept, masked = utils.random_token_mask(
                size=(len(images), self.sequence_length), mask_ratio=self.mask_ratio, device=images.device
            )
        else:
            order = 1 + noise.argsort(dim=1)
            count = int(noise.shape[1] * (1 - self.mask_ratio))
            kept = torch.cat([torch.zeros_like(order[:, :1]), order[:, :count]], dim=1)
            masked = order[:, count:]
        encoded = self.backbone.encode(images=images, idx_keep=kept)
        decoded = self.decoder.embed(encoded)
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), self.sequence_length))
        tokens = utils.set_at_index(tokens, kept, decoded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), masked - 1)
        mean, std = compute_patch_statistics(target)
        return nn.functional.mse_loss(predicted, (target - mean) / std)


def create_lightly_peer(ours: MaskedAutoencoder) -> Competitor:
    """Create the MAE of lightly with the weights of quarterview."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MAEDecoderTIMM is to be renamed
        model = LightlyMAE(ours)
    return Competitor(model, model, model)


def create_stable_pretraining_peer(ours: MaskedAutoencoder) -> Competitor:
    """Create the MAE of stable-pretraining with the weights of quarterview."""
    from stable_pretraining.methods import MAE
    from timm.models.vision_transformer import VisionTransformer

    config, shape = ours.config, ours.config.shape
    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=shape.patch_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.num_heads,
        num_classes=0,
    )
    model = MAE(
        vit, config.decoder_width, config.decoder_depth, config.decoder_heads, mask_ratio=config.mask_ratio
    )
    weights = ours.state_dict()
    vit.load_state_dict({k: v for k, v in weights.items() if "decoder" not in k and k != "mask_token"})
    vit.pos_embed.requires_grad_(False)
    decoder = model.decoder.transformer
    renamed = {
        "context_proj.": "decoder_embed.",
        "blocks.": "decoder_blocks.",
        "final_norm.": "decoder_norm.",
        "output_proj.": "decoder_pred.",
    }
    for peer_prefix, own_prefix in renamed.items():
        part = {k.removeprefix(own_prefix): v for k, v in weights.items() if k.startswith(own_prefix)}
        decoder.get_submodule(peer_prefix[:-1]).load_state_dict(part)
    decoder.pos_embed.copy_(weights["decoder_pos_embed"][:, 1:])
    nn.init.zeros_(decoder.query_proj.weight)  # so that the bias is the mask token
    decoder.query_proj.bias.data.copy_(weights["mask_token"].flatten())
    for module in decoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    # The values of its patches are ordered channel first.
    p, chans = shape.patch_size, config.in_chans
    order = torch.arange(p * p * chans).view(p, p, chans).permute(2, 0, 1).flatten()
    decoder.output_proj.weight.data.copy_(weights["decoder_pred.weight"][order])
    decoder.output_proj.bias.data.copy_(weights["decoder_pred.bias"][order])

    def compute_loss_with_noise(images: Tensor, noise: Tensor) -> Tensor:
        drawn = [torch.rand(len(images)), noise]  # the model calls torch.rand twice, in this order
        with patch("torch.rand", side_effect=drawn):
            return model(images).loss

    return Competitor(model, lambda images: model(images).loss, compute_loss_with_noise)


def compute_loss_without_cls(ours: MaskedAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """Compute the loss of quarterview without the cls token in the decoder."""
    order = noise.argsort(dim=1)
    visible, hidden = order[:, : ours.num_visible].sort().values, order[:, ours.num_visible :].sort().values
    mask = torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False)
    seen = ours.decoder_embed(ours.encode(images, mask)[:, 1:])
    positions = ours.decoder_pos_embed[0, 1:]
    x = torch.cat([seen + positions[visible], ours.mask_token + positions[hidden]], dim=1)
    for block in ours.decoder_blocks:
        x = block(x)
    pred = ours.decoder_pred(ours.decoder_norm(x[:, ours.num_visible :]))
    return ours.target.loss(pred, ours.target(images, ours.patchify(images), hidden)).mean()


PEERS: dict[Peer, Callable[[MaskedAutoencoder], Competitor]] = {
    "transformers": create_transformers_peer,
    "lightly": create_lightly_peer,
    "stable-pretraining": create_stable_pretraining_peer,
}


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison."""

    config: MAEConfig
    batch: int
    precision: Literal["bf16", "fp32"]
    device: str
    compiled: bool
    kept_memory: bool


def create_verified_peer(name: Peer, ours: MaskedAutoencoder) -> tuple[Competitor, str]:
    """Create the model of a library with the weights of quarterview, and check that the losses are equal.

    Returns:
        The model and a message with both losses.
    """
    config = ours.config
    peer = PEERS[name](ours)
    peer.model.train()
    images, noise = torch.randn(2, config.in_chans, *config.image_size), torch.rand(2, config.num_patches)
    with torch.no_grad():
        theirs = peer.loss_with_noise(images, noise)
        without_cls = name == "stable-pretraining"
        own = compute_loss_without_cls(ours, images, noise) if without_cls else ours(images, noise=noise).loss
    torch.testing.assert_close(theirs, own, atol=1e-5, rtol=0)
    return peer, f"loss {theirs:.6f}, of quarterview {own:.6f}"


def make_own_step(
    ours: MaskedAutoencoder, settings: Settings, images: Tensor, compiled: bool
) -> Callable[[], object]:
    """Return a function that performs a training step of quarterview."""
    device = images.device
    objective = MaskedAutoencoding(ours, seed=0)
    step = TrainStep(
        objective,
        create_adamw(objective, 0.05),
        World(device),
        get_autocast_context(settings.precision, device),
    )
    ids = torch.arange(len(images), device=device)
    batch = Batch(images, ids, torch.zeros_like(ids))
    if compiled:
        ours.compile()
    return lambda: step.update_weights(step.accumulate_gradients(batch)[0])


def make_peer_step(
    peer: Competitor, settings: Settings, images: Tensor, compiled: bool
) -> Callable[[], object]:
    """Return a function that performs a training step of another library with a plain PyTorch loop."""
    autocast = get_autocast_context(settings.precision, images.device)
    trained = [p for p in peer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    loss = torch.compile(peer.loss) if compiled else peer.loss

    def run() -> None:
        with autocast():
            value = loss(images)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def run_competitor(name: str, settings: Settings, pipe: Connection) -> None:
    """Create a model and warm up, then time as many steps as the pipe requests; runs in its own process."""
    if name == OWN_NAME or settings.kept_memory:
        keep_freed_memory()
    try:
        torch.manual_seed(0)
        device = torch.device(settings.device)
        ours = MaskedAutoencoder(settings.config)
        losses = ""
        images = torch.randn(
            settings.batch, settings.config.in_chans, *settings.config.image_size, device=device
        )
        if name == OWN_NAME:
            run = make_own_step(ours.to(device), settings, images, settings.compiled)
        else:
            peer, losses = create_verified_peer(name, ours)
            del ours
            peer.model.to(device)
            run = make_peer_step(peer, settings, images, settings.compiled)
        warmup_s = sum(time_once(run, device) for _ in range(3))
    except Exception as error:
        pipe.send(f"failed: {(str(error).splitlines() or [''])[0]} ({type(error).__name__})")
        return
    pipe.send((warmup_s, losses))
    while (steps := pipe.recv()) is not None:
        pipe.send(time_once(lambda: [run() for _ in range(steps)], device) / steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(torch.cuda.max_memory_allocated() if device.type == "cuda" else peak)


class CompetitorProcess:
    """A process that times the training step of a library."""

    def __init__(self, name: str, settings: Settings) -> None:
        context = get_context("spawn")
        self.name = f"{name}, compiled" if settings.compiled else name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=run_competitor, args=(name, settings, other), daemon=True)
        self.process.start()
        other.close()  # recv raises EOFError if the process is killed, since no other copy is open
        answer = self.pipe.recv()
        self.is_running = isinstance(answer, tuple)
        status = f"ready after {answer[0]:.0f} s; {answer[1]}" if isinstance(answer, tuple) else answer
        print(f"{self.name}: {status}", flush=True)

    def time_steps(self, steps: int) -> float:
        """Return the seconds per training step, measured over so many steps."""
        self.pipe.send(steps)
        return self.pipe.recv()

    def stop(self) -> int:
        """Stop the process and return its peak memory in bytes."""
        self.pipe.send(None)
        peak = self.pipe.recv()
        self.process.join()
        return peak


def main(
    model: str = "mae_vit_base_patch16",
    image_size: int = 224,
    decoder: tuple[int, int, int] = (512, 8, 16),
    batch: int = 16,
    precision: Literal["bf16", "fp32"] = "bf16",
    peers: tuple[Peer, ...] = ("transformers", "lightly", "stable-pretraining"),
    compiled: tuple[bool, ...] = (False, True),
    kept_memory: bool = False,
    rounds: int = 7,
    steps: int = 2,
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path | None = None,
) -> None:
    """Time the training steps.

    Args:
        decoder: width, depth and heads.
        batch: images per step.
        peers: libraries to compare with.
        compiled: time eager steps (False), compiled steps (True), or both, one after the other.
        kept_memory: give the other libraries the allocator settings of quarterview.
        rounds: number of measurements of each library, of which the median is reported.
        steps: training steps per measurement.
        out: JSON file to write.
    """
    width, depth, heads = decoder
    config = MAEConfig(
        model=model, image_size=(image_size,), decoder_width=width, decoder_depth=depth, decoder_heads=heads
    )
    where = torch.device(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    products = list_matrix_products(config, batch)
    matmul_rates: list[dict] = []
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for each in compiled:
        settings = Settings(config, batch, precision, device, each, kept_memory)
        processes = [CompetitorProcess(name, settings) for name in (OWN_NAME, *peers)]
        running = [process for process in processes if process.is_running]
        for _ in range(rounds):
            matmul_rates.append(measure_flops_per_s(products, dtype, where))
            for process in running:
                times.setdefault(process.name, []).append(process.time_steps(steps))
        memory |= {process.name: process.stop() for process in running}

    rates = {
        product: statistics.median(rates_of_round[product] for rates_of_round in matmul_rates)
        for product in products
    }
    limit, per_image = max(rates.values()), count_flops(config).step
    medians = {name: statistics.median(each) for name, each in times.items()}
    # Compare eager with eager and compiled with compiled, and finally the fastest with the fastest.
    ratio = {
        name: each / medians[name.replace(name.partition(",")[0], OWN_NAME)] for name, each in medians.items()
    }
    fastest = min(seconds for name, seconds in medians.items() if name.startswith(OWN_NAME))
    rival = min(
        (seconds for name, seconds in medians.items() if not name.startswith(OWN_NAME)), default=fastest
    )
    utilization = {name: per_image * batch / seconds / limit for name, seconds in medians.items()}
    print(f"limit {limit / 1e9:.0f} GFLOP/s; {per_image / 1e9:.2f} GFLOP per image")
    for name, seconds in medians.items():
        print(
            f"{name:30} {batch / seconds:8.2f} images/s {utilization[name]:5.0%} of the limit "
            f"{memory[name] / 2**30:6.2f} GiB   quarterview is {ratio[name]:.2f} times as fast"
        )
    print(f"fastest against fastest: {rival / fastest:.2f} times as fast")
    if out is not None:
        record = {
            "settings": {**asdict(settings), "compiled": compiled, "threads": torch.get_num_threads()},
            "flops_per_image": per_image,
            "products": {"×".join(map(str, product)): rate for product, rate in rates.items()},
            "seconds": times,
            "images_per_s": {name: batch / seconds for name, seconds in medians.items()},
            "share_of_limit": utilization,
            "quarterview_is_faster_by": ratio,
            "best_against_best": rival / fastest,
            "peak_memory": memory,
            "peers": {name: version(name) for name in (*peers, "timm")},
            **collect_provenance(sys.argv),
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)

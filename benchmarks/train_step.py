"""How fast is a whole training step, beside the peers' on the same arithmetic?

Forward, backward and AdamW, each contestant in a process of its own as its users have it, taking
turns, eager and compiled:

- quarterview: this package's model, step and allocator settings;
- transformers: ViTMAEForPreTraining;
- lightly: MaskedVisionTransformerTIMM and MAEDecoderTIMM, put together as its documentation does;
- stable-pretraining: its MAE, whose decoder does not see the cls token.

First every peer is given our weights and our noise, and must compute our loss in float32 (the last
one ours without the cls token in the decoder). Then each draws its own masks, as documented. All use
the fused AdamW, which is kinder to them than the default that their documentation shows. In every
round the machine's own rate of matrix products is measured, too. `--kept-memory` gives the peers our
allocator settings as well.

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

from quarterview.benchmark.rate import product_rates, products_of, timed
from quarterview.data.loader import Batch
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.models.config import MAEConfig
from quarterview.models.flops import flops
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import patch_statistics
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.distributed import World
from quarterview.training.optim import adamw
from quarterview.training.record import provenance
from quarterview.training.step import Step
from quarterview.training.trainer import precision_context
from quarterview.weights import export_transformers

Peer = Literal["transformers", "lightly", "stable-pretraining"]
OWN = "quarterview"


class Contestant(NamedTuple):
    """A model, the loss that its own code draws masks for, and the loss of given noise."""

    model: nn.Module
    documented: Callable[[Tensor], Tensor]
    given: Callable[[Tensor, Tensor], Tensor]


def transformers_peer(ours: MaskedAutoencoder) -> Contestant:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        export_transformers(ours, folder)
        model = transformers.ViTMAEForPreTraining.from_pretrained(Path(folder) / "mae")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("position_embeddings" not in name and "pos_embed" not in name)
    return Contestant(
        model, lambda images: model(images).loss, lambda images, noise: model(images, noise=noise).loss
    )


class LightlyMAE(nn.Module):
    """The training step of lightly's documentation, with its target normalised as in the paper."""

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
            num_heads=shape.heads,
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
        mean, std = patch_statistics(target)
        return nn.functional.mse_loss(predicted, (target - mean) / std)


def lightly_peer(ours: MaskedAutoencoder) -> Contestant:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MAEDecoderTIMM is to be renamed
        model = LightlyMAE(ours)
    return Contestant(model, model, model)


def stable_pretraining_peer(ours: MaskedAutoencoder) -> Contestant:
    from stable_pretraining.methods import MAE
    from timm.models.vision_transformer import VisionTransformer

    config, shape = ours.config, ours.config.shape
    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=shape.patch_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
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
    for theirs, mine in renamed.items():
        part = {k.removeprefix(mine): v for k, v in weights.items() if k.startswith(mine)}
        decoder.get_submodule(theirs[:-1]).load_state_dict(part)
    decoder.pos_embed.copy_(weights["decoder_pos_embed"][:, 1:])
    nn.init.zeros_(decoder.query_proj.weight)  # so that its bias is our mask token
    decoder.query_proj.bias.data.copy_(weights["mask_token"].flatten())
    for module in decoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    # Its patches are cut with the channel first.
    p, chans = shape.patch_size, config.in_chans
    order = torch.arange(p * p * chans).view(p, p, chans).permute(2, 0, 1).flatten()
    decoder.output_proj.weight.data.copy_(weights["decoder_pred.weight"][order])
    decoder.output_proj.bias.data.copy_(weights["decoder_pred.bias"][order])

    def given(images: Tensor, noise: Tensor) -> Tensor:
        drawn = [torch.rand(len(images)), noise]  # what it asks torch for, in this order
        with patch("torch.rand", side_effect=drawn):
            return model(images).loss

    return Contestant(model, lambda images: model(images).loss, given)


def without_cls(ours: MaskedAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """Our loss, if the decoder did not see the cls token."""
    order = noise.argsort(dim=1)
    visible, hidden = order[:, : ours.kept].sort().values, order[:, ours.kept :].sort().values
    mask = torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False)
    seen = ours.decoder_embed(ours.encode(images, mask)[:, 1:])
    positions = ours.decoder_pos_embed[0, 1:]
    x = torch.cat([seen + positions[visible], ours.mask_token + positions[hidden]], dim=1)
    for block in ours.decoder_blocks:
        x = block(x)
    pred = ours.decoder_pred(ours.decoder_norm(x[:, ours.kept :]))
    return ours.target.loss(pred, ours.target(images, ours.patchify(images), hidden)).mean()


PEERS: dict[Peer, Callable[[MaskedAutoencoder], Contestant]] = {
    "transformers": transformers_peer,
    "lightly": lightly_peer,
    "stable-pretraining": stable_pretraining_peer,
}


@dataclass(frozen=True)
class Contest:
    """What is timed."""

    config: MAEConfig
    batch: int
    precision: Literal["bf16", "fp32"]
    device: str
    compiled: bool
    kept_memory: bool


def checked(name: Peer, ours: MaskedAutoencoder) -> tuple[Contestant, str]:
    """A peer with our weights, shown to compute our loss, and what was shown."""
    config = ours.config
    peer = PEERS[name](ours)
    peer.model.train()
    images, noise = torch.randn(2, config.in_chans, *config.image_size), torch.rand(2, config.patches)
    with torch.no_grad():
        theirs = peer.given(images, noise)
        alone = name == "stable-pretraining"
        mine = without_cls(ours, images, noise) if alone else ours(images, noise=noise).loss
    torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=0)
    return peer, f"loss {theirs:.6f}, ours {mine:.6f}"


def own_step(
    ours: MaskedAutoencoder, contest: Contest, images: Tensor, compiled: bool
) -> Callable[[], object]:
    """An update as the package's own loop makes it."""
    device = images.device
    objective = MaskedAutoencoding(ours, seed=0)
    step = Step(
        objective, adamw(objective, 0.05), World(device), precision_context(contest.precision, device)
    )
    ids = torch.arange(len(images), device=device)
    batch = Batch(images, ids, torch.zeros_like(ids))
    if compiled:
        ours.compile()
    return lambda: step.apply(step.gradients(batch)[0])


def peers_step(peer: Contestant, contest: Contest, images: Tensor, compiled: bool) -> Callable[[], object]:
    """An update as one would write it."""
    autocast = precision_context(contest.precision, images.device)
    trained = [p for p in peer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    loss = torch.compile(peer.documented) if compiled else peer.documented

    def run() -> None:
        with autocast():
            value = loss(images)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def contend(name: str, contest: Contest, pipe: Connection) -> None:
    """In a process of its own: make ready, then time a few steps whenever asked."""
    if name == OWN or contest.kept_memory:
        keep_freed_memory()
    try:
        torch.manual_seed(0)
        device = torch.device(contest.device)
        ours = MaskedAutoencoder(contest.config)
        shown = ""
        images = torch.randn(
            contest.batch, contest.config.in_chans, *contest.config.image_size, device=device
        )
        if name == OWN:
            run = own_step(ours.to(device), contest, images, contest.compiled)
        else:
            peer, shown = checked(name, ours)
            del ours
            peer.model.to(device)
            run = peers_step(peer, contest, images, contest.compiled)
        ready = sum(timed(run, device) for _ in range(3))
    except Exception as error:
        pipe.send(f"does not run: {(str(error).splitlines() or [''])[0]} ({type(error).__name__})")
        return
    pipe.send((ready, shown))
    while (steps := pipe.recv()) is not None:
        pipe.send(timed(lambda: [run() for _ in range(steps)], device) / steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(torch.cuda.max_memory_allocated() if device.type == "cuda" else peak)


class Process:
    """A contestant at the other end of a pipe."""

    def __init__(self, name: str, contest: Contest) -> None:
        context = get_context("spawn")
        self.name = f"{name}, compiled" if contest.compiled else name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=contend, args=(name, contest, other), daemon=True)
        self.process.start()
        other.close()  # so that a process that is killed ends the waiting for it
        answer = self.pipe.recv()
        self.runs = isinstance(answer, tuple)
        said = f"ready after {answer[0]:.0f} s; {answer[1]}" if isinstance(answer, tuple) else answer
        print(f"{self.name}: {said}", flush=True)

    def seconds(self, steps: int) -> float:
        self.pipe.send(steps)
        return self.pipe.recv()

    def end(self) -> int:
        """Its peak of memory in bytes."""
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
    """Time the steps.

    Args:
        decoder: width, depth and heads.
        compiled: whether to time eager steps, compiled ones, or both, one after the other.
        kept_memory: give the peers our allocator settings, too.
        rounds: how often the contestants take turns; medians over rounds are reported.
        steps: steps a turn.
        out: JSON file to write.
    """
    width, depth, heads = decoder
    config = MAEConfig(
        model=model, image_size=(image_size,), decoder_width=width, decoder_depth=depth, decoder_heads=heads
    )
    where = torch.device(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    products = products_of(config, batch)
    limits: list[dict] = []
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for each in compiled:
        contest = Contest(config, batch, precision, device, each, kept_memory)
        running = [process for name in (OWN, *peers) if (process := Process(name, contest)).runs]
        for _ in range(rounds):
            limits.append(product_rates(products, dtype, where))
            for process in running:
                times.setdefault(process.name, []).append(process.seconds(steps))
        memory |= {process.name: process.end() for process in running}

    rates = {product: statistics.median(limit[product] for limit in limits) for product in products}
    limit, per_image = max(rates.values()), flops(config).step
    medians = {name: statistics.median(each) for name, each in times.items()}
    # Eager is compared with eager, compiled with compiled, and at the end the best with the best.
    ratio = {
        name: each / medians[name.replace(name.partition(",")[0], OWN)] for name, each in medians.items()
    }
    best = min(seconds for name, seconds in medians.items() if name.startswith(OWN))
    rival = min((seconds for name, seconds in medians.items() if not name.startswith(OWN)), default=best)
    shares = {name: per_image * batch / seconds / limit for name, seconds in medians.items()}
    print(f"limit {limit / 1e9:.0f} GFLOP/s; {per_image / 1e9:.2f} GFLOP an image")
    for name, seconds in medians.items():
        print(
            f"{name:30} {batch / seconds:8.2f} images/s {shares[name]:5.0%} of the limit "
            f"{memory[name] / 2**30:6.2f} GiB   quarterview is {ratio[name]:.2f} times as fast"
        )
    print(f"best against best: {rival / best:.2f} times as fast")
    if out is not None:
        record = {
            "settings": {**asdict(contest), "compiled": compiled, "threads": torch.get_num_threads()},
            "flops_per_image": per_image,
            "products": {"×".join(map(str, product)): rate for product, rate in rates.items()},
            "seconds": times,
            "images_per_s": {name: batch / seconds for name, seconds in medians.items()},
            "share_of_limit": shares,
            "quarterview_is_faster_by": ratio,
            "best_against_best": rival / best,
            "peak_memory": memory,
            "peers": {name: version(name) for name in (*peers, "timm")},
            **provenance(sys.argv),
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)

"""How fast is a training step of ViT-tiny/4 at 32 pixels, decoder 128×2, batch 256, beside peers?

Full steps (forward, backward, fused AdamW) in bf16 autocast, taking turns in one process:

- quarterview: this package's model;
- transformers: ViTMAEForPreTraining with the same weights, whose loss is first asserted to be ours;
- plain script: what one writes in an hour from timm's blocks: all patches embedded, then gathered;
  the decoder predicts every patch; attention by the fused kernel.

    uv run python benchmarks/tiny_step.py --out docs/results/tiny_step.json
"""

import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
import tyro
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import quarterview as qv
from quarterview.exchange import export_transformers

IMAGE, PATCH, BATCH = 32, 4, 256
KEPT, PATCHES = 16, 64


class PlainScript(nn.Module):
    """A masked autoencoder without any care for speed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 192, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, 192))
        self.pos = nn.Parameter(torch.zeros(1, PATCHES, 192))
        self.blocks = nn.Sequential(*[Block(192, 3, qkv_bias=True) for _ in range(12)])
        self.norm, self.down = nn.LayerNorm(192), nn.Linear(192, 128)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 128))
        self.decoder_pos = nn.Parameter(torch.zeros(1, PATCHES + 1, 128))
        self.decoder = nn.Sequential(*[Block(128, 4, qkv_bias=True) for _ in range(2)])
        self.decoder_norm, self.pred = nn.LayerNorm(128), nn.Linear(128, PATCH * PATCH * 3)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.pos
        order = noise.argsort(1)
        back = order.argsort(1)
        kept = order[:, :KEPT, None]
        x = x.gather(1, kept.expand(-1, -1, 192))
        x = self.norm(self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], 1)))
        x = self.down(x)
        hidden = self.mask_token.expand(len(x), PATCHES - KEPT, -1).to(x.dtype)
        everything = torch.cat([x[:, 1:], hidden], 1).gather(1, back[:, :, None].expand(-1, -1, 128))
        x = torch.cat([x[:, :1], everything], 1) + self.decoder_pos
        pred = self.pred(self.decoder_norm(self.decoder(x)))[:, 1:]
        side = IMAGE // PATCH
        target = (
            images.reshape(-1, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = (back >= KEPT).float()
        return ((((pred.float() - target) ** 2).mean(-1)) * mask).sum() / mask.sum()


def contestants(images: Tensor, noise: Tensor) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """The models and their losses, ours and transformers' asserted to be equal."""
    torch.manual_seed(0)
    ours = qv.create_model(
        "mae_vit_tiny_patch4", image_size=IMAGE, decoder_width=128, decoder_depth=2, decoder_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        export_transformers(ours, folder)
        theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder)
    plain = PlainScript()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images, noise=noise).loss, theirs(images, noise=noise).loss, atol=1e-5, rtol=0
        )
    return {
        "quarterview": (ours, lambda: ours(images, noise=noise).loss),
        "transformers": (theirs.train(), lambda: theirs(images, noise=noise).loss),
        "plain script": (plain, lambda: plain(images, noise)),
    }


def main(rounds: int = 6, steps: int = 4, out: Path | None = None) -> None:
    """Time the steps.

    Args:
        rounds: how often the contestants take turns; medians over rounds are reported.
        steps: steps a turn.
        out: JSON file to write.
    """
    torch.manual_seed(0)
    images, noise = torch.randn(BATCH, 3, IMAGE, IMAGE), torch.rand(BATCH, PATCHES)
    runners = {}
    for name, (model, loss) in contestants(images, noise).items():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)

        def step(loss: Callable[[], Tensor] = loss, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        runners[name] = step
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, step in runners.items():
            began = time.perf_counter()
            for _ in range(steps):
                step()
            rates[name].append(steps * BATCH / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(
            f"{name:14} {rate:6.0f} images/s   quarterview: {medians['quarterview'] / rate:.2f} times as fast"
        )
    if out is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
            "versions": {n: version(n) for n in ("torch", "transformers", "timm")},
            "images_per_s": rates,
            "medians": medians,
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)

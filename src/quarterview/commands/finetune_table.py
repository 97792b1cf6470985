"""What fine-tuning does to each parameter: its learning rate, its decay, and whether it moves at all."""

from typing import Any

import torch

from quarterview.commands.finetune import FinetuneConfig, count_blocks, start_of
from quarterview.models.classifier import Classifier, freeze_all_but
from quarterview.training.logging import Journal
from quarterview.training.optim import layer_decay_groups


def parameter_table(model: Classifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Every parameter's name, highest learning rate, weight decay, and whether it is trained."""
    peak = config.peak_lr(config.batch_size)
    groups = layer_decay_groups(model, config.weight_decay, config.layer_decay, len(model.blocks))
    found = {name: group for group in groups for name in group["names"]}
    return [
        {
            "name": name,
            "trained": name in found,
            "lr": peak * found[name]["lr_scale"] if name in found else 0.0,
            "weight_decay": found[name]["weight_decay"] if name in found else 0.0,
        }
        for name, _ in model.named_parameters()
    ]


def show_parameters(config: FinetuneConfig, journal: Journal) -> None:
    """Show the `parameter_table` of what would be trained, and the drop path of each block.

    Raises:
        UserError: if the start says nothing of the network.
    """
    for blocks in config.blocks:
        model = Classifier(start_of(config))
        freeze_all_but(model, count_blocks(blocks))
        rows = [
            (row["name"], f"{row['lr']:.3e}" if row["trained"] else "frozen", f"{row['weight_decay']:g}")
            for row in parameter_table(model, config)
        ]
        title = f"parameters, blocks trained: {blocks}"
        journal.table(title, ["name", "peak learning rate", "weight decay"], rows)
    rates = torch.linspace(0, config.drop_path, start_of(config).shape.depth).tolist()
    journal.say("drop path by block: " + " ".join(f"{rate:.3g}" for rate in rates))

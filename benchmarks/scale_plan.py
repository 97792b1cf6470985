"""What a pre-training on many ranks would take: hours, bytes, cores, memory, cost, and what saturates first.

    uv run python benchmarks/scale_plan.py

prints the tables of docs/scale.md. Operations, parameters and bytes are counted; what a core decodes
was measured (docs/pack.md); everything else is an assumption, named as one, and a field to change:

    uv run python benchmarks/scale_plan.py --model mae_vit_base_patch16 --images 5000000 --ranks 16
"""

import heapq
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import tyro

from quarterview.commands.config import PretrainConfig
from quarterview.commands.dry_run import ADAM_BYTES, measure
from quarterview.models.flops import Flops, flops
from quarterview.training.distributed import choose_device

IMAGENET = 1_281_167
MEASURED = {
    "photographs": (652, 102 * 1024),
    "packed jpeg": (1394, 28 * 1024),
    "packed raw": (2638, 252 * 1024),
}
"""Images that one core reads from the page cache, decodes, crops and resizes in a second, and the bytes
of one: docs/pack.md, 2026-11-23, one virtual core of machine A."""


@dataclass(frozen=True)
class Plan:
    """A run and what it is assumed to run on."""

    model: str = "mae_vit_huge_patch14"
    images: int = IMAGENET
    epochs: float = 800
    batch_size: int = 4096
    ranks: int = 64
    """GPUs."""
    ranks_per_node: int = 8
    accum_iter: int = 1
    """Parts of a rank's images, one after the other."""
    grad_checkpointing: bool = False
    stored_as: Literal["photographs", "packed jpeg", "packed raw"] = "packed jpeg"
    """What is read."""

    gpu_tflops: float = 989.0
    """Assumed: the data sheet's rate of dense bf16 products of the GPU (H100 SXM)."""
    gpu_gib: float = 80.0
    """Assumed: its memory."""
    share: float = 0.3
    """Assumed: the share of that rate which a step achieves. Nothing was measured on a GPU."""
    cores: float = 12.0
    """Assumed: cores a rank has for decoding, each as fast as one of machine A."""
    node_gbit: float = 400.0
    """Assumed: what a node sends, and at once receives, between nodes, in Gbit/s."""
    inside_gbyte: float = 450.0
    """Assumed: what a GPU sends to others of its node, in GB/s (NVLink of an H100)."""
    storage_gbyte: float = 2.0
    """Assumed: what a node reads from object storage, in GB/s."""
    latency_ms: float = 30.0
    """Assumed: the median time to the first byte of a ranged read."""
    spread: float = 0.5
    """Assumed: the standard deviation of the latency's logarithm; 0.5 has one read in
    a hundred at 3.2 medians."""
    stream_mbyte: float = 80.0
    """Assumed: what a single read is sent at, in MB/s."""
    images_a_read: int = 256
    """Images fetched at once: neighbours in a shard, kept until they are used. 1 reads each by itself."""
    disk_gbyte: float = 1.0
    """Assumed: what one rank writes to the run's folder, in GB/s."""
    checkpoint_minutes: float = 10.0
    """Between checkpoints."""
    price: float = 2.0
    """The reader's own: of a GPU for an hour, in any currency."""

    # ------------------------------------------------------------------ counted

    @cached_property
    def config(self) -> PretrainConfig:
        """Of what one rank computes at a time."""
        return PretrainConfig.from_flags(
            model=self.model,
            image_size=(224, 224),
            batch_size=self.batch_size // (self.ranks * self.accum_iter),
            grad_checkpointing=self.grad_checkpointing,
        )

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return _measured(self.config)[0]

    @property
    def activations(self) -> int:
        """Bytes that a forward pass keeps, as a CPU would compute it."""
        return _measured(self.config)[2]

    @cached_property
    def operations(self) -> Flops:
        """Of an image."""
        return flops(self.config.autoencoder())

    @property
    def computed(self) -> int:
        """Operations that are carried out for an image: recomputed ones count here."""
        again = self.operations.encoder + self.operations.decoder if self.grad_checkpointing else 0
        return self.operations.step + again

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return math.ceil(self.epochs * self.images / self.batch_size)

    @property
    def total_operations(self) -> float:
        """That the method needs for the whole run."""
        return float(self.operations.step) * self.steps * self.batch_size

    @property
    def nodes(self) -> int:
        """Machines."""
        return math.ceil(self.ranks / self.ranks_per_node)

    # ------------------------------------------------------------------ seconds of a step

    @property
    def compute_s(self) -> float:
        """Of a rank's part of a batch."""
        return self.batch_size / self.ranks * self.computed / (self.gpu_tflops * 1e12 * self.share)

    @property
    def gradient_bytes(self) -> int:
        """In float32."""
        return 4 * self.parameters

    @property
    def sent_bytes(self) -> float:
        """By each member of a ring that averages the gradients."""
        return 2 * (self.ranks - 1) / self.ranks * self.gradient_bytes

    @property
    def reduce_s(self) -> float:
        """Of averaging gradients once in a step: through the slower of the links that it uses."""
        slowest = self.inside_gbyte * 1e9
        if self.nodes > 1:
            slowest = min(slowest, self.node_gbit * 1e9 / 8)
        return self.sent_bytes / slowest

    @property
    def backward_s(self) -> float:
        """In which gradients can be averaged as they come: two thirds of the computing."""
        return 2 / 3 * self.compute_s

    @property
    def step_s(self) -> float:
        """With what of the averaging does not fit beside the backward pass."""
        return self.compute_s + max(0.0, self.reduce_s - self.backward_s)

    # ------------------------------------------------------------------ input

    @property
    def wanted(self) -> float:
        """Images a second that a rank could train on."""
        return self.batch_size / self.ranks / self.step_s

    @property
    def decoded(self) -> float:
        """Images a second that a core decodes."""
        return MEASURED[self.stored_as][0]

    @property
    def image_bytes(self) -> int:
        """Of a stored image."""
        return MEASURED[self.stored_as][1]

    @property
    def cores_needed(self) -> float:
        """By a rank, were reading free."""
        return self.wanted / self.decoded

    @property
    def workers(self) -> int:
        """Of a rank: one on each core."""
        return max(1, int(self.cores))

    @property
    def parts_s(self) -> Mapping[str, float]:
        """Of a worker with a block of images, at the median latency and with its node's link to itself."""
        return {
            "waiting for the first byte": self.latency_ms / 1e3,
            "receiving": self.images_a_read * self.image_bytes / (self.stream_mbyte * 1e6),
            "decoding": self.images_a_read / self.decoded,
        }

    @property
    def read_bytes_s(self) -> float:
        """Of all ranks, from storage."""
        return self.wanted * self.ranks * self.image_bytes

    # ------------------------------------------------------------------ what fills up

    @property
    def memory_bytes(self) -> float:
        """Of a rank: weights, gradients, moments and buckets of gradients in float32, and activations."""
        return self.parameters * (ADAM_BYTES + 4) + self.activations

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and two moments in float32."""
        return 12 * self.parameters

    @property
    def write_s(self) -> float:
        """Of a checkpoint by one rank."""
        return self.checkpoint_bytes / (self.disk_gbyte * 1e9)

    @property
    def loads(self) -> Mapping[str, float]:
        """How much of what there is a run at the GPUs' own speed would use, the GPUs set aside."""
        longest = max(self.parts_s, key=lambda part: self.parts_s[part])
        rate = self.workers * self.images_a_read / sum(self.parts_s.values())
        return {
            f"workers, mostly {longest}": self.wanted / rate,
            "a node's storage link": self.read_bytes_s / self.nodes / (self.storage_gbyte * 1e9),
            "gradient averaging beside the backward pass": self.reduce_s / self.backward_s,
            "GPU memory": self.memory_bytes / (self.gpu_gib * 2**30),
            "the disk for checkpoints": self.write_s / (60 * self.checkpoint_minutes),
        }

    @cached_property
    def waiting(self) -> float:
        """The share of time in which GPUs wait for images, simulated."""
        return simulate(self)

    @property
    def hours(self) -> float:
        """Of the whole run: steps, and waiting for images. Checkpoints are written beside them."""
        return self.steps * self.step_s / (1 - self.waiting) / 3600

    @property
    def cost(self) -> float:
        """Of the GPUs, at the reader's price."""
        return self.hours * self.ranks * self.price


@lru_cache
def _measured(config: PretrainConfig) -> tuple[int, int, int]:
    return measure(config, "bf16", choose_device("cpu"))


def simulate(plan: Plan, steps: int = 400, prefetch: int = 4, seed: int = 0) -> float:
    """The share of time in which a rank waits for images, by discrete events.

    Each of a rank's workers in turn reads a block of images, after a lognormal latency, and then decodes it,
    one image after the other. Images wait in a store of `prefetch` batches for each worker; a worker that
    finds it full waits. The GPU takes a batch a step. The first batches fill the store and are not counted.
    """
    draw = random.Random(seed)
    batch = plan.batch_size // plan.ranks
    room = max(prefetch * plan.workers * batch, 2 * plan.images_a_read)

    latency, alone, decoding = plan.parts_s.values()
    link = plan.storage_gbyte * 1e9 / (plan.ranks_per_node * plan.workers)  # each worker's part of it
    receiving = max(alone, plan.images_a_read * plan.image_bytes / link)

    def block() -> float:
        return latency * math.exp(plan.spread * draw.gauss(0, 1)) + receiving + decoding

    ready = [draw.random() * block() for _ in range(plan.workers)]  # when each worker has its next block
    heapq.heapify(ready)
    stored, clock, waited, counted_from = 0, 0.0, 0.0, 0.0
    warm = steps // 4
    for step in range(steps):
        if step == warm:
            waited, counted_from = 0.0, clock
        while stored < batch or (ready[0] <= clock and stored + plan.images_a_read <= room):
            done = heapq.heappop(ready)
            if done > clock:  # nothing to train on
                waited, clock = waited + done - clock, done
            stored += plan.images_a_read
            # One that found the store full begins again where there was room: when the last batch was taken.
            heapq.heappush(ready, max(done, clock - plan.step_s) + block())
        stored -= batch
        clock += plan.step_s
    return waited / (clock - counted_from)


# ---------------------------------------------------------------------- the tables

H14 = Plan()
L16 = Plan(model="mae_vit_large_patch16", images=10**9, epochs=1)
FAST = 3200.0
CHOSEN: Mapping[str, Plan] = {
    "H/14, 8 GPUs": replace(H14, ranks=8, accum_iter=2),
    "H/14, 64 GPUs": H14,
    "H/14, 64 GPUs, 3200 Gbit/s": replace(H14, node_gbit=FAST),
    "the same, 1600 epochs": replace(H14, epochs=1600, node_gbit=FAST),
    "L/16, 64 GPUs": L16,
    "L/16, 64 GPUs, 3200 Gbit/s": replace(L16, node_gbit=FAST),
}


def rows(plan: Plan) -> dict[str, str]:
    """What is told of a plan."""
    first, load = max(plan.loads.items(), key=lambda item: item[1])
    saturated = f"{first} ({load:.0%})" if load > 1 else f"the GPUs; next {first} ({load:.0%})"
    parts = f" in {plan.accum_iter} parts" if plan.accum_iter > 1 else ""
    parts += ", recomputing" if plan.grad_checkpointing else ""
    averaging = f"{1e3 * plan.reduce_s:.0f}; {1e3 * plan.backward_s:.0f}"
    return {
        "images × epochs": f"{plan.images:,} × {plan.epochs:g}",
        "batch, and a GPU's part of it": f"{plan.batch_size}, {plan.batch_size // plan.ranks}{parts}",
        "operations of an image, 10⁹": f"{plan.operations.step / 1e9:.1f}",
        "operations of the run": f"{plan.total_operations:.2e}",
        "steps": f"{plan.steps:,}",
        "computing, ms a step": f"{1e3 * plan.compute_s:.0f}",
        "gradients, GB a step": f"{plan.gradient_bytes / 1e9:.2f}",
        "averaging them, ms; beside the backward pass": averaging,
        "step, ms": f"{1e3 * plan.step_s:.0f}",
        "images/s of all": f"{plan.wanted * plan.ranks:,.0f}",
        "**hours**": f"**{plan.hours:.1f}**",
        "GPU hours": f"{plan.hours * plan.ranks:,.0f}",
        f"cost at {plan.price:g} a GPU hour": f"{plan.cost:,.0f}",
        "images stored, TB": f"{plan.images * plan.image_bytes / 1e12:.3g}",
        "input of all, GB/s": f"{plan.read_bytes_s / 1e9:.2f}",
        "cores to decode, a GPU": f"{plan.cores_needed:.2f}",
        "waiting for images, simulated": f"{plan.waiting:.1%}",
        "parameters, 10⁶": f"{plan.parameters / 1e6:.1f}",
        "weights, gradients, AdamW, buckets, GiB": f"{plan.parameters * (ADAM_BYTES + 4) / 2**30:.1f}",
        "activations, GiB": f"{plan.activations / 2**30:.1f}",
        "checkpoint, GB; writing it, s": f"{plan.checkpoint_bytes / 1e9:.1f}; {plan.write_s:.1f}",
        "saturates first": saturated,
    }


def table(plans: Mapping[str, Plan]) -> str:
    """What is told of plans, a column for each."""
    columns = [rows(plan) for plan in plans.values()]
    return markdown([["", *plans], *([name, *(column[name] for column in columns)] for name in columns[0])])


def reading(plan: Plan, sizes: Sequence[int] = (1, 4, 16, 64, 256)) -> str:
    """Waiting for images, by how they are stored and how many come with a read."""
    shares = [
        [replace(plan, stored_as=kind, images_a_read=size).waiting for kind in MEASURED] for size in sizes
    ]
    cells = [[str(size), *(f"{share:.0%}" for share in row)] for size, row in zip(sizes, shares, strict=True)]
    return markdown([["images a read", *MEASURED], *cells])


def linking(
    plan: Plan, links: Sequence[float] = (100, 400, 1600, 3200), gpus: Sequence[int] = (16, 64, 256)
) -> str:
    """Hours, by the link of a node and the number of GPUs."""
    cells = [
        [f"{link:g} Gbit/s", *(f"{replace(plan, node_gbit=link, ranks=n).hours:.1f}" for n in gpus)]
        for link in links
    ]
    return markdown([["between nodes", *(f"{n} GPUs" for n in gpus)], *cells])


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table, its first row the head."""
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the tables of docs/scale.md, or what is told of one plan."""
    if len(sys.argv) > 1:
        plan = tyro.cli(Plan, description=__doc__)
        print(table({"this plan": plan}), "\n\nHow full each part is at the GPUs' speed:\n")
        for name, load in sorted(plan.loads.items(), key=lambda item: -item[1]):
            print(f"{load:6.0%}  {name}")
        return
    print(table(CHOSEN))
    print("\nHours of ViT-H/14, 800 epochs:\n")
    print(linking(H14))
    print("\nThe share of time that GPUs wait for images, ViT-L/16 on 64 GPUs, 3200 Gbit/s:\n")
    print(reading(replace(L16, node_gbit=FAST)))


if __name__ == "__main__":
    main()

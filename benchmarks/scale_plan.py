"""Estimate the hours, cost, memory and data rates of a pre-training on many GPUs, and its first bottleneck.

    uv run python benchmarks/scale_plan.py

prints the tables of docs/scale.md. Operations, parameters and bytes are counted, and the decoding rate of a
CPU core was measured (docs/pack.md). Everything else is an assumption, marked as such, that a flag changes:

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
from quarterview.commands.dry_run import ADAMW_BYTES_PER_PARAMETER, estimate_memory
from quarterview.models.flops import Flops, count_flops

IMAGENET = 1_281_167
STORAGE_FORMATS = {
    "photographs": (652, 102 * 1024),
    "packed jpeg": (1394, 28 * 1024),
    "packed raw": (2638, 252 * 1024),
}
"""By storage format, images per second that one core reads from the page cache, decodes, crops and resizes,
and bytes per image. Measured on one virtual core of machine A, 2026-11-23 (docs/pack.md)."""


@dataclass(frozen=True)
class Plan:
    """A pre-training and the hardware that it is assumed to run on."""

    model: str = "mae_vit_huge_patch14"
    images: int = IMAGENET
    epochs: float = 800
    batch_size: int = 4096
    ranks: int = 64
    """GPUs."""
    ranks_per_node: int = 8
    accum_iter: int = 1
    """Gradient accumulation: parts of the batch of a rank that are processed one after the other."""
    grad_checkpointing: bool = False
    stored_as: Literal["photographs", "packed jpeg", "packed raw"] = "packed jpeg"
    """Storage format of the images."""

    gpu_tflops: float = 989.0
    """Assumed: peak rate of a GPU for dense bf16 matrix products, from the data sheet (H100 SXM)."""
    gpu_gib: float = 80.0
    """Assumed: memory of a GPU."""
    mfu: float = 0.3
    """Assumed: model FLOPs utilization, the fraction of the peak rate that a training step achieves. It was
    not measured on a GPU."""
    cores: float = 12.0
    """Assumed: decoding cores per rank, each as fast as one of machine A."""
    node_gbit: float = 400.0
    """Assumed: full-duplex bandwidth of a node to other nodes, in Gbit/s."""
    inside_gbyte: float = 450.0
    """Assumed: bandwidth of a GPU to other GPUs of its node, in GB/s (NVLink of an H100)."""
    storage_gbyte: float = 2.0
    """Assumed: bandwidth of a node from object storage, in GB/s."""
    latency_ms: float = 30.0
    """Assumed: median time to the first byte of a ranged read."""
    latency_log_std: float = 0.5
    """Assumed: standard deviation of the logarithm of the latency; with 0.5, one read in a hundred takes 3.2
    times the median."""
    stream_mbyte: float = 80.0
    """Assumed: bandwidth of a single read, in MB/s."""
    images_per_read: int = 256
    """Neighbouring images of a shard that one read fetches; they are kept until they are used."""
    disk_gbyte: float = 1.0
    """Assumed: bandwidth of one rank to the folder of the run, in GB/s."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints."""
    price_per_hour: float = 2.0
    """Price of a GPU for an hour, in any currency; an example, to be replaced by your own."""

    # ------------------------------------------------------------------ counted quantities

    @cached_property
    def config(self) -> PretrainConfig:
        """Configuration with the batch that one rank computes at a time."""
        return PretrainConfig.from_flags(
            model=self.model,
            image_size=(224, 224),
            batch_size=self.batch_size // (self.ranks * self.accum_iter),
            grad_checkpointing=self.grad_checkpointing,
        )

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return _measure_cached(self.config)[0]

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations that a forward pass saves, counted for a CPU."""
        return _measure_cached(self.config)[2]

    @cached_property
    def method_flops(self) -> Flops:
        """Floating-point operations of the method per image, without recomputation."""
        return count_flops(self.config.autoencoder())

    @property
    def computed_flops_per_image(self) -> int:
        """Floating-point operations per training image, including recomputation by gradient checkpointing."""
        recomputed = self.method_flops.encoder + self.method_flops.decoder if self.grad_checkpointing else 0
        return self.method_flops.step + recomputed

    @property
    def steps(self) -> int:
        """Training steps of the whole run."""
        return math.ceil(self.epochs * self.images / self.batch_size)

    @property
    def total_flops(self) -> float:
        """Floating-point operations of the whole run, without recomputation."""
        return float(self.method_flops.step) * self.steps * self.batch_size

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return math.ceil(self.ranks / self.ranks_per_node)

    # ------------------------------------------------------------------ seconds of a step

    @property
    def compute_s(self) -> float:
        """Seconds of computation per step."""
        return (
            self.batch_size / self.ranks * self.computed_flops_per_image / (self.gpu_tflops * 1e12 * self.mfu)
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients in float32."""
        return 4 * self.num_parameters

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends in a ring all-reduce of the gradients."""
        return 2 * (self.ranks - 1) / self.ranks * self.gradient_bytes

    @property
    def reduce_s(self) -> float:
        """Seconds of the all-reduce of the gradients per step, over the slowest link of the ring."""
        slowest = self.inside_gbyte * 1e9
        if self.num_nodes > 1:
            slowest = min(slowest, self.node_gbit * 1e9 / 8)
        return self.sent_bytes / slowest

    @property
    def backward_s(self) -> float:
        """Seconds of the backward pass, two thirds of the computation, which can overlap the all-reduce."""
        return 2 / 3 * self.compute_s

    @property
    def step_s(self) -> float:
        """Seconds per step: computation, and the all-reduce where the backward pass does not hide it."""
        return self.compute_s + max(0.0, self.reduce_s - self.backward_s)

    # ------------------------------------------------------------------ data loading

    @property
    def images_per_s(self) -> float:
        """Images per second that a rank trains on if data loading is not a bottleneck."""
        return self.batch_size / self.ranks / self.step_s

    @property
    def decoded_per_s(self) -> float:
        """Images per second that a core decodes."""
        return STORAGE_FORMATS[self.stored_as][0]

    @property
    def image_bytes(self) -> int:
        """Bytes per stored image."""
        return STORAGE_FORMATS[self.stored_as][1]

    @property
    def cores_needed(self) -> float:
        """Decoding cores per rank, if reading took no time."""
        return self.images_per_s / self.decoded_per_s

    @property
    def workers(self) -> int:
        """Data-loading workers per rank, one per core."""
        return max(1, int(self.cores))

    @property
    def worker_times_s(self) -> Mapping[str, float]:
        """Seconds of a worker per read, at the median latency and with the link of the node to itself."""
        return {
            "waiting for the first byte": self.latency_ms / 1e3,
            "receiving": self.images_per_read * self.image_bytes / (self.stream_mbyte * 1e6),
            "decoding": self.images_per_read / self.decoded_per_s,
        }

    @property
    def read_bytes_per_s(self) -> float:
        """Bytes per second that all ranks read from storage."""
        return self.images_per_s * self.ranks * self.image_bytes

    # ------------------------------------------------------------------ bottlenecks

    @property
    def memory_bytes(self) -> float:
        """Bytes per GPU: weights, gradients, AdamW moments and DDP buckets in float32, and activations."""
        return self.num_parameters * (ADAMW_BYTES_PER_PARAMETER + 4) + self.activation_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: weights and two AdamW moments in float32."""
        return 12 * self.num_parameters

    @property
    def write_s(self) -> float:
        """Seconds in which one rank writes a checkpoint."""
        return self.checkpoint_bytes / (self.disk_gbyte * 1e9)

    @property
    def utilizations(self) -> Mapping[str, float]:
        """Utilization of each resource except the GPUs, if the GPUs never waited; above 1 is a bottleneck."""
        longest = max(self.worker_times_s, key=lambda part: self.worker_times_s[part])
        rate = self.workers * self.images_per_read / sum(self.worker_times_s.values())
        return {
            f"data workers, mostly {longest}": self.images_per_s / rate,
            "storage link of a node": self.read_bytes_per_s / self.num_nodes / (self.storage_gbyte * 1e9),
            "gradient all-reduce during the backward pass": self.reduce_s / self.backward_s,
            "GPU memory": self.memory_bytes / (self.gpu_gib * 2**30),
            "checkpoint disk": self.write_s / (60 * self.checkpoint_minutes),
        }

    @cached_property
    def waiting_fraction(self) -> float:
        """Fraction of time in which GPUs wait for images, from `simulate_waiting`."""
        return simulate_waiting(self)

    @property
    def hours(self) -> float:
        """Hours of the whole run, including waiting for images; checkpoints are written in the background."""
        return self.steps * self.step_s / (1 - self.waiting_fraction) / 3600

    @property
    def cost(self) -> float:
        """Cost of the GPUs for the whole run."""
        return self.hours * self.ranks * self.price_per_hour


@lru_cache
def _measure_cached(config: PretrainConfig) -> tuple[int, int, int]:
    return estimate_memory(config, "bf16")


def simulate_waiting(plan: Plan, steps: int = 400, prefetch: int = 4, seed: int = 0) -> float:
    """Compute the fraction of time in which a rank waits for images, by a discrete-event simulation.

    Each worker of the rank reads a block of images, after a lognormal latency, and decodes it. Decoded images
    go to a queue of `prefetch` batches per worker, and a worker waits while the queue is full. The GPU takes
    a batch per step. The first quarter of the steps, which fills the queue, is not counted.

    Args:
        steps: simulated training steps.
        prefetch: capacity of the queue in batches per worker.
        seed: seed of the latencies.
    """
    generator = random.Random(seed)
    batch = plan.batch_size // plan.ranks
    capacity = max(prefetch * plan.workers * batch, 2 * plan.images_per_read)

    latency, receiving_alone, decoding = plan.worker_times_s.values()
    link = plan.storage_gbyte * 1e9 / (plan.ranks_per_node * plan.workers)  # bandwidth per worker
    receiving = max(receiving_alone, plan.images_per_read * plan.image_bytes / link)

    def draw_block_time() -> float:
        return latency * math.exp(plan.latency_log_std * generator.gauss(0, 1)) + receiving + decoding

    # Times at which the workers finish their current blocks.
    ready = [generator.random() * draw_block_time() for _ in range(plan.workers)]
    heapq.heapify(ready)
    queued, clock, waited, start = 0, 0.0, 0.0, 0.0
    warmup_steps = steps // 4
    for step in range(steps):
        if step == warmup_steps:
            waited, start = 0.0, clock
        while queued < batch or (ready[0] <= clock and queued + plan.images_per_read <= capacity):
            finished = heapq.heappop(ready)
            if finished > clock:  # the GPU waits
                waited, clock = waited + finished - clock, finished
            queued += plan.images_per_read
            # A worker that found the queue full resumes when the last batch was taken.
            heapq.heappush(ready, max(finished, clock - plan.step_s) + draw_block_time())
        queued -= batch
        clock += plan.step_s
    return waited / (clock - start)


# ---------------------------------------------------------------------- tables

H14 = Plan()
L16 = Plan(model="mae_vit_large_patch16", images=10**9, epochs=1)
FAST_NODE_GBIT = 3200.0
PLANS: Mapping[str, Plan] = {
    "H/14, 8 GPUs": replace(H14, ranks=8, accum_iter=2),
    "H/14, 64 GPUs": H14,
    "H/14, 64 GPUs, 3200 Gbit/s": replace(H14, node_gbit=FAST_NODE_GBIT),
    "the same, 1600 epochs": replace(H14, epochs=1600, node_gbit=FAST_NODE_GBIT),
    "L/16, 64 GPUs": L16,
    "L/16, 64 GPUs, 3200 Gbit/s": replace(L16, node_gbit=FAST_NODE_GBIT),
}


def describe_plan(plan: Plan) -> dict[str, str]:
    """Return the rows of the table for one plan, by label."""
    first, load = max(plan.utilizations.items(), key=lambda item: item[1])
    bottleneck = f"{first} ({load:.0%})" if load > 1 else f"GPUs, then {first} ({load:.0%})"
    parts = f" in {plan.accum_iter} parts" if plan.accum_iter > 1 else ""
    parts += ", gradient checkpointing" if plan.grad_checkpointing else ""
    state_bytes = plan.num_parameters * (ADAMW_BYTES_PER_PARAMETER + 4)
    all_reduce = f"{1e3 * plan.reduce_s:.0f}; {1e3 * plan.backward_s:.0f}"
    return {
        "images × epochs": f"{plan.images:,} × {plan.epochs:g}",
        "batch size, per GPU": f"{plan.batch_size}, {plan.batch_size // plan.ranks}{parts}",
        "GFLOP per image": f"{plan.method_flops.step / 1e9:.1f}",
        "FLOP of the run": f"{plan.total_flops:.2e}",
        "steps": f"{plan.steps:,}",
        "computation, ms per step": f"{1e3 * plan.compute_s:.0f}",
        "gradients, GB per step": f"{plan.gradient_bytes / 1e9:.2f}",
        "gradient all-reduce, ms; backward pass, ms": all_reduce,
        "step, ms": f"{1e3 * plan.step_s:.0f}",
        "images/s, all GPUs": f"{plan.images_per_s * plan.ranks:,.0f}",
        "**hours**": f"**{plan.hours:.1f}**",
        "GPU hours": f"{plan.hours * plan.ranks:,.0f}",
        f"cost at {plan.price_per_hour:g} per GPU hour": f"{plan.cost:,.0f}",
        "images stored, TB": f"{plan.images * plan.image_bytes / 1e12:.3g}",
        "data, GB/s, all GPUs": f"{plan.read_bytes_per_s / 1e9:.2f}",
        "decoding cores per GPU": f"{plan.cores_needed:.2f}",
        "waiting for images, simulated": f"{plan.waiting_fraction:.1%}",
        "parameters, 10⁶": f"{plan.num_parameters / 1e6:.1f}",
        "weights, gradients, AdamW, DDP buckets, GiB": f"{state_bytes / 2**30:.1f}",
        "activations, GiB": f"{plan.activation_bytes / 2**30:.1f}",
        "checkpoint, GB; writing it, s": f"{plan.checkpoint_bytes / 1e9:.1f}; {plan.write_s:.1f}",
        "first bottleneck": bottleneck,
    }


def format_plans(plans: Mapping[str, Plan]) -> str:
    """Format a Markdown table with one column per plan."""
    columns = [describe_plan(plan) for plan in plans.values()]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return format_markdown_table([["", *plans], *rows])


def format_waiting_table(plan: Plan, sizes: Sequence[int] = (1, 4, 16, 64, 256)) -> str:
    """Format a Markdown table of the waiting time by storage format and images per read."""
    plans = {
        size: [replace(plan, stored_as=name, images_per_read=size) for name in STORAGE_FORMATS]
        for size in sizes
    }
    rows = [[str(size), *(f"{each.waiting_fraction:.0%}" for each in row)] for size, row in plans.items()]
    return format_markdown_table([["images per read", *STORAGE_FORMATS], *rows])


def format_network_table(
    plan: Plan, bandwidths: Sequence[float] = (100, 400, 1600, 3200), gpus: Sequence[int] = (16, 64, 256)
) -> str:
    """Format a Markdown table of the hours by network bandwidth of a node and number of GPUs."""
    cells = [
        [f"{gbit:g} Gbit/s", *(f"{replace(plan, node_gbit=gbit, ranks=n).hours:.1f}" for n in gpus)]
        for gbit in bandwidths
    ]
    return format_markdown_table([["between nodes", *(f"{n} GPUs" for n in gpus)], *cells])


def format_markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table whose first row is the header."""
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the tables of docs/scale.md or, with flags, the estimates of one plan."""
    if len(sys.argv) > 1:
        plan = tyro.cli(Plan, description=__doc__)
        print(format_plans({"this plan": plan}))
        print("\nUtilization of each resource if the GPUs never waited:\n")
        for name, load in sorted(plan.utilizations.items(), key=lambda item: -item[1]):
            print(f"{load:6.0%}  {name}")
        return
    print(format_plans(PLANS))
    print("\nHours of ViT-H/14, 800 epochs:\n")
    print(format_network_table(H14))
    print("\nFraction of time in which GPUs wait for images, ViT-L/16 on 64 GPUs, 3200 Gbit/s:\n")
    print(format_waiting_table(replace(L16, node_gbit=FAST_NODE_GBIT)))


if __name__ == "__main__":
    main()

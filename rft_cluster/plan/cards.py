"""Cards: what a GPU holds and how fast it is, by its maker's data sheet."""

from dataclasses import dataclass

from rft_cluster.cluster.machine import memory_here, smallest_gpu
from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import nearest
from rft_cluster.config import Config

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU.

    `gib`: memory that programs can use, about 1 % less than the sheet's. `flops`: dense BF16 with FP32 accumulation, a
    second. `bandwidth`: bytes a second of its memory. `link`: bytes a second, one way, to the next GPU of a node.
    `record`: the file in benchmarks/results with figures measured on this card; empty: none were measured.
    """

    name: str
    gib: float
    flops: float
    bandwidth: float
    link: float
    record: str = ""


TERA, GIGA = 1e12, 1e9
PCIE_4 = 25 * GIGA  # of 32 GB/s in one direction, x16
# NVIDIA's data sheets of H100 SXM5, H200 SXM, A100 SXM4, L40S, L4 and A10, and its papers on the architectures Ampere
# (GA102), Ada and Blackwell for the GeForce cards, whose rate with FP32 accumulation is half of that with FP16. Rates
# with sparsity are twice as high, and not used. NVLink: half of the total, which counts both ways.
CARDS = {
    "h200": Card("H200 (141 GB)", 139.8, 989 * TERA, 4800 * GIGA, 450 * GIGA),
    "h100": Card("H100 (80 GB)", 79.2, 989 * TERA, 3350 * GIGA, 450 * GIGA, "gpu_learner.json"),
    "a100-80": Card("A100 (80 GB)", 79.2, 312 * TERA, 2039 * GIGA, 300 * GIGA),
    "a100-40": Card("A100 (40 GB)", 39.4, 312 * TERA, 1555 * GIGA, 300 * GIGA),
    "l40s": Card("L40S (48 GB)", 44.4, 362 * TERA, 864 * GIGA, PCIE_4),
    "5090": Card("RTX 5090 (32 GB)", 31.4, 209 * TERA, 1792 * GIGA, 2 * PCIE_4),
    "4090": Card("RTX 4090 (24 GB)", 23.5, 165 * TERA, 1008 * GIGA, PCIE_4),
    "3090": Card("RTX 3090 (24 GB)", 23.6, 71 * TERA, 936 * GIGA, PCIE_4),
    "a10": Card("A10 (24 GB)", 22.1, 125 * TERA, 600 * GIGA, PCIE_4),
    "l4": Card("L4 (24 GB)", 22.0, 121 * TERA, 300 * GIGA, PCIE_4),
}
DEFAULT = "h100"


def find_card(name: str) -> Card:
    """The card of this name.

    Raises:
        UserError: there is none.
    """
    key = name.lower()
    if key not in CARDS:
        near = nearest(key, CARDS)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(f"--gpu {name}: {hint}The table has {', '.join(CARDS)}")
    return CARDS[key]


def card_here(config: Config) -> Card:
    """The card to plan for: this machine's GPU if the run starts here and the table has it, else an H100. On CPUs, this
    machine."""
    if config.cluster.device == "cpu":
        return this_machine(config.cluster.dtype)
    name, memory = ("", 0) if config.cluster.joins else smallest_gpu()
    return card_named(name, memory / GIB) or CARDS[DEFAULT]


def card_named(name: str, gib: float) -> Card | None:
    """The card with the driver's name of a GPU, e.g. "NVIDIA H100 80GB HBM3", and about this memory."""
    products = {card: card.name.partition(" (")[0] for card in CARDS.values()}
    found = (card for card, product in products.items() if product in name and abs(gib / card.gib - 1) < 0.1)
    return next(found, None)


def this_machine(dtype: str) -> Card:
    """This machine as a card: its memory, and rates that are measured now."""
    from rft_cluster.model.rates import measured_rates  # imports torch, which takes seconds

    flops, bandwidth = measured_rates(dtype)
    return Card("this machine", memory_here() / GIB, flops, bandwidth, bandwidth)

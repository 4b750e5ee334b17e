"""What large models on GPUs would see: COMPUTED from bytes, links and rates, not measured. Inputs name their sources.

python -m tests.bench.projection [--json FILE]

A time is that of the busiest link, at the link's usable rate: what overlaps at best. So these are floors, the same
for every mode, and their ratios are what the modes' data paths decide.
"""

import argparse
import heapq
import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONTEXTS = (32_768, 131_072, 262_144, 524_288, 1_048_576)
CHUNK_TOKENS = 2048
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Model:
    """Llama-3-70B, as its published config.json has it; KV in bfloat16."""

    layers: int = 80
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 8192
    parameters: float = 70.6e9
    value_bytes: int = 2

    @property
    def kv_bytes_token(self) -> int:
        """KV bytes of one token on all ranks together."""
        return self.layers * self.kv_heads * self.head_dim * 2 * self.value_bytes

    def prefill_flops(self, tokens: int) -> float:
        """Two a parameter and token, and causal attention's two products."""
        return 2 * self.parameters * tokens + 2 * tokens**2 * self.hidden * self.layers


@dataclass(frozen=True, slots=True)
class Host:
    """Eight H100 SXM. Rates one way, bytes a second; sources beside them."""

    devices: int = 8
    nvlink: float = 450e9  # NVIDIA H100 data sheet: 900 GB/s both ways
    pcie: float = 55e9  # PCIe 5.0 x16: 63 GB/s by the standard's coding, some 55 usable
    network: float = 50e9  # one 400 Gb/s port for the host
    flops: float = 989e12  # NVIDIA H100 data sheet, dense bfloat16
    utilisation: float = 0.5  # of flops in prefill: assumed, generous to recomputing


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One chunk of CHUNK_TOKENS in one mode: seconds on the busiest device link, on the host's network, bytes kept."""

    mode: str
    device_link_s: float
    network_s: float
    host_bytes: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """One rank lost at a context: seconds until its KV is back, by way, and the host memory that waited for it."""

    tokens: int
    recompute_s: float
    replicate_s: float
    parity_s: float
    parity_other_host_s: float
    parity_gb: float
    replicate_gb: float


def checkpoints(model: Model, host: Host, m: int = 1) -> list[Checkpoint]:
    """Gather-to-one as the paper does it, full copies, and the exchange spread over all ranks."""
    k = host.devices
    chunk = CHUNK_TOKENS * model.kv_bytes_token / k  # of one rank
    return [
        Checkpoint("gather to one", max((k - 1) * chunk / host.nvlink, m * chunk / host.pcie),
                   m * chunk / host.network, m * chunk),
        Checkpoint("full copies", chunk / host.pcie, k * chunk / host.network, k * chunk),
        Checkpoint("spread exchange", max((k - 1) / k * chunk / host.nvlink, m * chunk / k / host.pcie),
                   m * chunk / host.network, m * chunk),
    ]  # fmt: skip


def recovery(model: Model, host: Host, tokens: int, m: int = 1) -> Recovery:
    """Restoring one rank's slice; its parity or copy comes over the network and PCIe, survivors' slices over NVLink."""
    k = host.devices
    lost = tokens * model.kv_bytes_token / k
    stored = max(lost / host.network, lost / host.pcie)
    return Recovery(
        tokens=tokens,
        recompute_s=model.prefill_flops(tokens) / (k * host.flops * host.utilisation),
        replicate_s=stored,
        parity_s=max(stored, (k - 1) * lost / host.nvlink),
        parity_other_host_s=k * lost / host.network,  # the replacement sits on another host
        parity_gb=m * lost / 1e9,
        replicate_gb=k * lost / 1e9,
    )


@dataclass(frozen=True, slots=True)
class Fleet:
    """Many groups that share spares and stores."""

    groups: int = 1000
    days: int = 365
    failures_a_device_day: float = 419 / (16_384 * 54)  # "The Llama 3 Herd of Models", table 5: 54 days of 16,384 GPUs
    whole_host: float = 0.22  # of those: not of one GPU or its memory (same table, rounded up)
    repair_s: float = DAY_S  # until a device is a spare again: assumed
    context: int = 131_072  # tokens in flight in a group: assumed
    second_loss_s: float = 0.5  # while a group restores, a second loss is more than m = 1


@dataclass(frozen=True, slots=True)
class Year:
    """A simulated year, means of the runs."""

    spares: int
    failures: float
    restored: float
    """Share of failures that cost no recomputing, with parity, m = 1."""
    waited: float
    """Share that found no spare."""
    longest_wait_h: float
    stall_parity_h: float
    """Group hours without tokens in the year, all groups together: waiting for spares apart."""
    stall_recompute_h: float


def simulate(fleet: Fleet, model: Model, host: Host, spares: int, runs: int = 5, seed: int = 1) -> Year:
    """Failures as a Poisson process over all devices; a lost device's place is taken by a spare, and it is repaired."""
    at = recovery(model, host, fleet.context)
    rate = fleet.groups * host.devices * fleet.failures_a_device_day / DAY_S
    years = []
    for run in range(runs):
        dice = random.Random(seed * 1000 + run)
        clock, free, back = 0.0, spares, list[float]()
        last_loss: dict[int, float] = {}
        total = restored = waited = 0
        longest = parity_s = recompute_s = 0.0
        while (clock := clock + dice.expovariate(rate)) < fleet.days * DAY_S:
            while back and back[0] <= clock:
                heapq.heappop(back)
                free += 1
            group, whole = dice.randrange(fleet.groups), dice.random() < fleet.whole_host
            second = clock - last_loss.get(group, -1e9) < fleet.second_loss_s
            last_loss[group] = clock
            total += 1
            kept = not whole and not second
            restored += kept
            parity_s += at.parity_s if kept else at.recompute_s
            recompute_s += at.recompute_s
            needed = host.devices if whole else 1
            free -= needed
            if free < 0:
                waited += 1
                longest = max(longest, sorted(back)[min(len(back), -free) - 1] - clock if back else fleet.repair_s)
            for _ in range(needed):
                heapq.heappush(back, clock + fleet.repair_s)
        years.append((total, restored / total, waited / total, longest / 3600, parity_s / 3600, recompute_s / 3600))
    return Year(spares, *(statistics.mean(column) for column in zip(*years, strict=True)))


@dataclass(frozen=True, slots=True)
class Projection:
    """All computed figures."""

    checkpoints: list[Checkpoint]
    recoveries: list[Recovery]
    years: list[Year]


def project() -> Projection:
    """Compute everything for Llama-3-70B, TP = 8, on one host of eight H100."""
    model, host, fleet = Model(), Host(), Fleet()
    return Projection(
        checkpoints(model, host),
        [recovery(model, host, tokens) for tokens in CONTEXTS],
        [simulate(fleet, model, host, spares) for spares in (8, 16, 32, 64, 128)],
    )


def tables(projection: Projection) -> list[Table]:
    """The figures, for a person."""
    chunk = Table(title=f"COMPUTED: one chunk of {CHUNK_TOKENS} tokens, Llama-3-70B, TP = 8, m = 1")
    for column in ("mode", "busiest device link, ms", "host's network, ms", "host memory, MB"):
        chunk.add_column(column, justify="right")
    for each in projection.checkpoints:
        chunk.add_row(
            each.mode, f"{each.device_link_s * 1e3:.2f}", f"{each.network_s * 1e3:.2f}", f"{each.host_bytes / 1e6:.0f}"
        )
    back = Table(title="COMPUTED: KV of one lost rank of eight back, seconds; host memory for one context, GB")
    for column in ("tokens", "recompute", "full copies", "parity", "parity, spare elsewhere", "GB parity", "GB copies"):
        back.add_column(column, justify="right")
    for row in projection.recoveries:
        back.add_row(
            f"{row.tokens:,}", f"{row.recompute_s:.2f}", f"{row.replicate_s:.3f}", f"{row.parity_s:.3f}",
            f"{row.parity_other_host_s:.3f}", f"{row.parity_gb:.1f}", f"{row.replicate_gb:.1f}",
        )  # fmt: skip
    fleet = Table(title="COMPUTED: a year of 1,000 groups of eight (Monte Carlo), 131,072 tokens in flight in each")
    for column in ("shared spares", "failures", "restored, share", "without a spare, share", "longest wait, h",
                   "stalled, h: parity", "recompute"):  # fmt: skip
        fleet.add_column(column, justify="right")
    for year in projection.years:
        fleet.add_row(
            str(year.spares), f"{year.failures:.0f}", f"{year.restored:.3f}", f"{year.waited:.3f}",
            f"{year.longest_wait_h:.1f}", f"{year.stall_parity_h:.2f}", f"{year.stall_recompute_h:.2f}",
        )  # fmt: skip
    return [chunk, back, fleet]


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="", metavar="FILE")
    arguments = parser.parse_args()
    projection = project()
    console = Console(width=120)
    for table in tables(projection):
        console.print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(projection), indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a drill does, and its flags."""

import argparse
import re
from dataclasses import dataclass

from shared.errors import GhostError

WORKERS, STORES, ANYONE = ("rank", "spare"), ("store",), ("rank", "spare", "store", "redis", "coordinator", "gateway")

FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "kill": ((*ANYONE, "all"), "SIGKILL"),
    "stop": (ANYONE, "SIGSTOP, and SIGCONT after --for seconds"),
    "slow": (ANYONE, "stopped nine tenths of the time, for --for seconds"),
    "hang": (("rank",), "its compute thread is stuck, while it still beats"),
    "cut:peers": (("rank",), "its communicators break, and new ones can't be made, for --for seconds"),
    "cut:coordinator": (("rank",), "nothing from or to the coordinator, for --for seconds"),
    "cut:store": (("rank",), "no store answers it, for --for seconds"),
    "corrupt:page": (("rank",), "a bit flips in each page of its KV"),
    "corrupt:wire": (("rank",), "a bit flips in all parity that it sends or receives, for --for seconds"),
    "corrupt:parity": (STORES, "a bit flips in each shard"),
    "garbage": (STORES, "all its shards become random bytes"),
    "full": (("store", "redis"), "no room for anything more, for --for seconds"),
    "empty": (("redis",), "it forgets everything"),
}
"""Fault -> who can have it, and what it is."""
OF_VLLM = {"kill", "stop", "slow", "corrupt:parity", "garbage", "full", "empty"}
"""What vLLM's ranks, and what protects them, can have."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a drill does. `targets` as on the command line, `then`: ranks killed `then_s` seconds after the fault."""

    fault: str = "kill"
    targets: tuple[str, ...] = ("rank:1",)
    when: str = "decode"
    prompt_tokens: int = 512
    max_tokens: int = 64
    streams: int = 1
    seed: int = 0
    for_s: float = 2.0
    then: tuple[str, ...] = ()
    then_s: float = 0.5
    cached: bool = False
    """The prompts' pages are in the prefix cache, and protected, before the fault comes."""

    @property
    def loses_ranks(self) -> int:
        """Ranks that the group is sure to lose, for good or for a while."""
        lossy = self.fault in ("kill", "stop", "hang", "cut:peers", "cut:coordinator")
        lost = [target for target in self.targets if lossy and target.startswith("rank")]
        return len({*lost, *self.then})

    @property
    def breaks_streams(self) -> bool:
        """Whether the connection of a client is lost with what is broken."""
        return self.fault == "kill" and bool({"gateway", "all"} & set(self.targets))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The drill's flags."""
    faults = "\n".join(f"  {name:16} {'|'.join(who)}: {what}" for name, (who, what) in FAULTS.items())
    parser.description = (
        "Start a cluster on free ports, stream completions with no fault, then the same ones while something is\n"
        "broken, compare, and print a timeline. Exits 0 only if every stream ended with the same text; streams whose\n"
        "gateway was killed are to break, and are asked for again.\n\n"
        f"faults, and what they can befall:\n{faults}"
    )
    parser.add_argument(
        "--engine", choices=["embedded", "vllm"], default="embedded", help="whose ranks are broken [embedded]"
    )
    parser.add_argument("--fault", choices=list(FAULTS), default="kill", metavar="FAULT", help="see above [kill]")
    parser.add_argument(
        "--target", default="rank:1", metavar="TARGET[,TARGET]",
        help="rank:N, spare, store:N, redis, coordinator, gateway, or all [rank:1]",
    )  # fmt: skip
    parser.add_argument("--for", dest="for_s", type=float, default=2.0, metavar="S", help="how long it lasts [2.0]")
    parser.add_argument("--then", default="", metavar="rank:N[,rank:M]", help="ranks killed 0.5 s after the fault")
    parser.add_argument("--when", default="decode", metavar="prefill|decode|token:N", help="when it comes [decode]")
    parser.add_argument(
        "--cached", action="store_true", help="the fault comes when the prompts' pages are cached and protected"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="tokens of each prompt [512]")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of each answer [64]")
    parser.add_argument("--streams", type=int, default=1, metavar="S", help="clients at once [1]")
    parser.add_argument("--protect-tail", action="store_true", help="protect each token's KV at its step")
    parser.add_argument("--protection", choices=["parity", "none"], default="parity", help="[parity]")
    parser.add_argument("--parity", type=int, default=1, metavar="M", help="parity shards a stripe [1]")
    parser.add_argument("--tp", type=int, default=3, metavar="K", help="ranks [3]")
    parser.add_argument("--spares", type=int, default=0, metavar="N", help="spares; 0: as many as ranks are lost [0]")
    parser.add_argument(
        "--stores", type=int, default=0, metavar="N", help="parity stores; 0: as many as parity shards [0]"
    )
    parser.add_argument("--transport", choices=["auto", "tcp", "ucx"], default="auto", help="bulk transport [auto]")
    parser.add_argument("--communicator", choices=["auto", "shm", "gloo"], default="auto", help="[auto]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="[float32]")
    parser.add_argument("--model", default="default", metavar="DIR", help="model [SmolLM2-135M-Instruct]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts [0]")
    parser.add_argument("--json", default="", metavar="FILE", help="write the report there")
    parser.add_argument("--log-dir", default="", metavar="DIR", help="keep the services' logs there")


def parse_options(arguments: argparse.Namespace) -> Options:
    """Options from flags. Raises GhostError for what can't be."""
    when = re.fullmatch(r"prefill|decode|token:(\d+)", arguments.when)
    if when is None or (when[1] and not 1 <= int(when[1]) < arguments.max_tokens):
        raise GhostError(f"--when {arguments.when!r}: prefill, decode, or token:N with N from 1 to max-tokens - 1")
    for name, least in (("prompt_tokens", 1), ("max_tokens", 2), ("streams", 1)):
        if getattr(arguments, name) < least:
            raise GhostError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {least}")
    if arguments.cached and arguments.when == "prefill":
        raise GhostError("--cached with --when prefill: of cached prompts there is no prefill")
    if arguments.engine == "vllm":
        _check_of_vllm(arguments)
    if arguments.for_s <= 0:
        raise GhostError(f"--for {arguments.for_s}: more than 0 seconds")
    stores = arguments.stores or arguments.parity
    return Options(
        arguments.fault,
        _targets("--target", arguments.target, arguments.fault, arguments.tp, stores),
        arguments.when,
        arguments.prompt_tokens,
        arguments.max_tokens,
        arguments.streams,
        arguments.seed,
        arguments.for_s,
        _targets("--then", arguments.then, "hang", arguments.tp, stores) if arguments.then else (),
        cached=arguments.cached,
    )


def _check_of_vllm(arguments: argparse.Namespace) -> None:
    """Raise GhostError for what a cluster whose engine is vLLM has not."""
    if arguments.fault not in OF_VLLM:
        raise GhostError(f"--fault {arguments.fault}: of vLLM {', '.join(sorted(OF_VLLM))}")
    if {"gateway", "all"} & set(arguments.target.split(",")):
        raise GhostError(f"--target {arguments.target}: the clients of vLLM are connected to itself")
    if arguments.protect_tail:
        raise GhostError("--protect-tail: of vLLM whole blocks are protected")


def _targets(flag: str, text: str, fault: str, ranks: int, stores: int) -> tuple[str, ...]:
    """The targets named by a flag, each once. Raises GhostError unless they exist and can have the fault."""
    allowed, found = FAULTS[fault][0], []
    limits = {"rank": ranks, "store": stores}
    for part in text.split(","):
        match = re.fullmatch(r"(rank|store):(\d+)|(spare|redis|coordinator|gateway|all)", part.strip())
        kind = (match[1] or match[3]) if match else ""
        if match is None or kind not in allowed or (match[2] and int(match[2]) >= limits[kind]):
            words = [f"{each}:N with N from 0 to {limits[each] - 1}" if each in limits else each for each in allowed]
            raise GhostError(f"{flag} {part!r}: {', '.join(words)}; several with commas")
        found.append(part.strip())
    return tuple(dict.fromkeys(found))

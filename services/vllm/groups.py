"""vLLM's groups of ranks, made by each process for itself: no collective is needed to make, change or end them."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from vllm.config import VllmConfig
from vllm.distributed import parallel_state
from vllm.distributed.parallel_state import GraphCaptureContext, GroupCoordinator
from vllm.platforms import current_platform

from services.vllm.communicator import RankCommunicator
from services.worker.communicator.base import Communicator


@dataclass(frozen=True, slots=True)
class _Shape:
    """In place of a torch ProcessGroup: mixtures of experts ask one for its size."""

    in_group: int
    members: int

    def rank(self) -> int:
        """This rank's number in the group."""
        return self.in_group

    def size(self) -> int:
        """Ranks of the group."""
        return self.members


class RankGroup(GroupCoordinator):
    """A GroupCoordinator over our communicator; its __init__ sets what GroupCoordinator's sets, less torch's groups.

    There is no cpu_group, and of device_group only what models ask of it: what would go past the communicator fails.
    """

    def __init__(self, name: str, ranks: list[int], rank: int, device: torch.device):
        self.unique_name = f"{name}:0"
        self.rank = rank
        self.local_rank = self.device_index = rank if device.index is None else device.index
        self.ranks = ranks
        self.group_ranks = [ranks]
        self.world_size = len(ranks)
        self.rank_in_group = ranks.index(rank)
        self.device_group = _Shape(self.rank_in_group, self.world_size)
        self.backend = self.torch_distributed_backend = "ghostserve"
        self.device = device
        self.use_device_communicator = len(ranks) > 1
        alone = len(ranks) == 1
        self.device_communicator = None if alone else RankCommunicator(self.unique_name, ranks, rank, device)
        self.mq_broadcaster = None
        self.use_custom_op_call = current_platform.use_custom_op_collectives()
        self.use_cpu_custom_send_recv = False
        self._pending_isends: deque[object] = deque()

    def broadcast(self, input_: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Fill `input_` with rank `src`'s."""
        return input_ if self.device_communicator is None else self.device_communicator.broadcast(input_, src)

    def barrier(self) -> None:
        """Wait until all ranks of the group have come."""
        if self.device_communicator is not None:
            self.device_communicator.all_reduce(torch.zeros(1, device=self.device))

    @contextmanager
    def graph_capture(self, graph_capture_context: GraphCaptureContext | None = None) -> Iterator[GraphCaptureContext]:
        """As GroupCoordinator's, which insists on a communicator of vLLM's own."""
        context = graph_capture_context or GraphCaptureContext(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
        context.stream.wait_stream(torch.cuda.current_stream(self.device))
        channel = self.device_communicator.channel if self.device_communicator is not None else None
        with torch.cuda.stream(context.stream), channel.still() if channel is not None else nullcontext():
            yield context

    def destroy(self) -> None:
        """Nothing is held here: the channel belongs to the process."""


@dataclass(frozen=True, slots=True)
class Groups:
    """What vllm.distributed.parallel_state holds for one rank of a tensor-parallel engine."""

    world: RankGroup
    tp: RankGroup
    dcp: RankGroup
    pcp: RankGroup
    pp: RankGroup
    dp: RankGroup
    ep: RankGroup | None

    @classmethod
    def of(cls, config: VllmConfig, rank: int, device: torch.device) -> "Groups":
        """Those that vLLM's own initialize_model_parallel makes, for this rank on this device."""
        ranks = list(range(config.parallel_config.tensor_parallel_size))
        alone = {name: RankGroup(name, [rank], rank, device) for name in ("dcp", "pcp", "pp", "dp")}
        world, tp = (RankGroup(name, ranks, rank, device) for name in ("world", "tp"))
        experts = RankGroup("ep", ranks, rank, device) if config.model_config.is_moe else None
        return cls(world, tp, **alone, ep=experts)

    def install(self) -> None:
        """Make these the groups that vLLM's code finds in this process."""
        state = parallel_state
        state._WORLD, state._NODE_COUNT = self.world, 1
        state._TP = state._ETP = self.tp
        state._DCP, state._PCP, state._PP, state._DP, state._EP = self.dcp, self.pcp, self.pp, self.dp, self.ep
        for each in self._all():
            parallel_state._register_group(each)

    def connect(self, channel: Communicator | None) -> None:
        """From now on the groups' collectives go over `channel`."""
        for each in self._all():
            if each.device_communicator is not None:
                each.device_communicator.channel = channel

    def _all(self) -> list[RankGroup]:
        groups = (getattr(self, field.name) for field in fields(self))
        return [group for group in groups if group is not None]

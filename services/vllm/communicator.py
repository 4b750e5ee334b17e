"""vLLM's collectives over our own communicators, which can be aborted; those of CPUs sleep while they wait."""

import torch
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

from services.worker.communicator.base import Communicator
from shared.errors import CommunicatorAborted


class RankCommunicator(DeviceCommunicatorBase):
    """A device communicator whose channel changes with the epoch, while vLLM goes on holding the same object.

    Without a channel each rank is alone: collectives have the right shapes and no meaning. So a spare warms up.
    """

    def __init__(self, unique_name: str, ranks: list[int], rank: int, device: torch.device):
        # The base class asks torch.distributed who is there; no group of torch.distributed exists here.
        self.device = device
        self.cpu_group = self.device_group = None
        self.unique_name = unique_name
        self.ranks = ranks
        self.rank = self.rank_in_group = ranks.index(rank)
        self.world_size = len(ranks)
        self.global_rank = rank
        self.global_world_size = len(ranks)
        self.is_ep_communicator = self.use_all2all = False
        self.all2all_backend = self.all2all_manager = None
        self.channel: Communicator | None = None

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors: in place on a CPU. Compiled code of a GPU may go on using what it gave."""
        if self.device.type == "cuda":
            input_ = input_.clone(memory_format=torch.contiguous_format)
        if self.channel is None:
            return input_
        if input_.is_contiguous():
            self.channel.all_reduce(input_)
            return input_
        whole = input_.contiguous()
        self.channel.all_reduce(whole)
        return input_.copy_(whole)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """All ranks' tensors, one after the other along `dim`."""
        parts = self._gathered(input_)
        return torch.cat(parts.unbind(0), dim=dim)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """As all_gather, for the rank `dst` of the group only."""
        gathered = self.all_gather(input_, dim)
        return gathered if self.rank_in_group == dst else None

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This rank's part, along `dim`, of the sum of all ranks' tensors."""
        whole = self.all_reduce(input_.clone())
        return whole.chunk(self.world_size, dim)[self.rank_in_group].contiguous()

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Fill `tensor` with that of rank `src` of the group."""
        return tensor.copy_(self._gathered(tensor)[src])

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Not here: ranks of a tensor-parallel group don't send to one another."""
        raise CommunicatorAborted("send between ranks: only tensor parallelism is supported")

    def recv(self, size: torch.Size, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """Not here: see `send`."""
        raise CommunicatorAborted("receive between ranks: only tensor parallelism is supported")

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """[size, *tensor.shape], each rank's in its place."""
        out = tensor.new_empty((self.world_size, *tensor.shape))
        if self.channel is None:
            return out.copy_(tensor)
        self.channel.all_gather(tensor.contiguous(), out)
        return out

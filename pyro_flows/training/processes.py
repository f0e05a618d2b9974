"""Several processes that train one flow on the same rows: each takes its part of every batch, and gradients are summed."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Processes"]


class Processes:
    """This process among those that ``torchrun`` started; one alone where it did not.

    A group that exists is used as it is. If there is none and the environment says that there are several processes, one is made: nccl for CUDA,
    else gloo.

    Args:
        device: where the flow's parameters are.
    """

    def __init__(self, device: torch.device) -> None:
        if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a batch."""
        return index[self.rank :: self.size]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes; may change ``value`` in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    @torch.no_grad()
    def same_start(self, module: nn.Module) -> None:
        """Give all processes the first one's parameters and buffers."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

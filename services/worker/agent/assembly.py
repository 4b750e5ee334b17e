"""A worker's parts put together for a group's configuration: coder, protector, restorer, shadow, runner."""

import asyncio
from collections.abc import Callable
from typing import Literal

import torch

from services.worker.agent.inventory import Inventory
from services.worker.device import Device, make_device
from services.worker.engine.model_files import resolve_model
from services.worker.engine.runner import Runner
from services.worker.shadow.coder import make_coder
from services.worker.shadow.protect import Protector
from services.worker.shadow.replicate import CopyRestorer, Replicator
from services.worker.shadow.restore import Restorer
from services.worker.shadow.shadow import Shadow
from services.worker.shadow.stores import StoreClients
from shared.config import WorkerSettings
from shared.errors import ConfigError
from shared.messages import Message
from shared.transport import ucx_engine
from shared.transport.backends import choose
from shared.types import GroupConfig


def make_runner(
    settings: WorkerSettings,
    device: torch.device,
    host_memory: int | None,
    config: GroupConfig,
    inventory: Inventory,
    stores: StoreClients,
    loop: asyncio.AbstractEventLoop,
    report: Callable[[Message], None],
) -> Runner:
    """The runner with all that is behind it; its threads run. Takes seconds. Raises ConfigError, ModelError.

    `stores` is used on `loop` only; `report` may be called from any thread.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device}: no CUDA device here")
    shadow = make_shadow(settings.transport, make_device(device), config, inventory, stores, loop, report)
    model_dir = resolve_model(settings.model or config.model)
    return Runner(model_dir, config, device, shadow, inventory, report, host_memory=host_memory)


def make_shadow(
    transport: Literal["auto", "tcp", "ucx"],
    device: Device,
    config: GroupConfig,
    inventory: Inventory,
    stores: StoreClients,
    loop: asyncio.AbstractEventLoop,
    report: Callable[[Message], None],
) -> Shadow:
    """The shadow of one rank, with its thread running, whichever engine the pages are of."""
    if choose(transport)[0] == "ucx":
        ucx_engine.library()  # most of a second, which no recovery shall wait for
    coder = make_coder(config.size, config.parity, device)
    if config.protection == "parity":
        coder.prepare()
    copies = config.protection == "replicate"
    protector = (Replicator if copies else Protector)(config.group, coder, stores, loop, report)
    restorer = (CopyRestorer if copies else Restorer)(config.group, coder, stores, loop, device)
    return Shadow(protector, restorer, inventory, report, device)

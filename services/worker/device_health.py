"""Whether a GPU can be used again after a process on it has died: by its state, as NVML tells it. The decision is pure.

A process that dies is replaced on its own device. Only a device that has failed itself is given up, and a spare
elsewhere takes the rank.
"""

import contextlib
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

FATAL_XIDS = {
    48: "an uncorrectable ECC error",
    62: "its microcontroller has halted",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    95: "an uncontained ECC error",
    119: "its system processor does not answer",
    120: "an error of its system processor",
    140: "an unrecovered ECC error",
}
"""Xids after which NVIDIA asks for a reset or a repair. Others (13, 31, 43, 45, 94) are of the program that ran."""


@dataclass(frozen=True, slots=True)
class Health:
    """What NVML says of a device."""

    lost: bool = False
    """It can't be reached any more."""
    remapping_failed: bool = False
    """A broken row of its memory could not be replaced by a spare one."""
    xids: tuple[int, ...] = ()
    """Critical events since the supervisor watches."""


def failure(health: Health) -> str:
    """Why the device can't be used again, in words; empty if it can."""
    if health.lost:
        return "the device is lost: it has fallen off the bus"
    if fatal := [xid for xid in health.xids if xid in FATAL_XIDS]:
        return f"the device failed: Xid {fatal[0]}, {FATAL_XIDS[fatal[0]]}"
    return "the device failed: a memory row could not be remapped" if health.remapping_failed else ""


def visible(places: Collection[int], setting: str | None) -> dict[int, int | str]:
    """Of each cuda:i, what NVML knows it by: an index, or a UUID. `setting`: CUDA_VISIBLE_DEVICES."""
    if setting is None:
        return {place: place for place in places}
    named = [each.strip() for each in setting.split(",") if each.strip()]
    return {place: int(name) if (name := named[place]).isdigit() else name for place in places if place < len(named)}


class DeviceWatch:
    """Watches some of a host's GPUs. Without NVML (no driver, no nvidia-ml-py) every device counts as healthy."""

    def __init__(self, places: Collection[int]):
        self._handles: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        self._xids: dict[int, tuple[int, ...]] = {}
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:  # ImportError, or NVML's own
            if places:
                log.warning("NVML can't be asked (%s): a device that fails is not told from a process that dies", error)
            return
        self._nvml = pynvml
        for place, name in visible(places, os.environ.get("CUDA_VISIBLE_DEVICES")).items():
            with contextlib.suppress(pynvml.NVMLError):
                by_index = isinstance(name, int)
                of = pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID
                self._handles[place] = handle = of(name)
                self._events[place] = events = pynvml.nvmlEventSetCreate()
                pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)

    def health(self, place: int) -> Health:
        """What is known of cuda:`place` now."""
        if (handle := self._handles.get(place)) is None:
            return Health()
        nvml, xids, remapping_failed = self._nvml, list(self._xids.get(place, ())), False
        with contextlib.suppress(nvml.NVMLError):  # Timeout: no further event
            while True:
                xids.append(int(nvml.nvmlEventSetWait_v2(self._events[place], 0).eventData))
        self._xids[place] = tuple(xids)
        try:
            nvml.nvmlDeviceGetPciInfo(handle)
            nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            remapping_failed = bool(nvml.nvmlDeviceGetRemappedRows(handle)[3])
        except nvml.NVMLError_GpuIsLost:
            return Health(lost=True, xids=tuple(xids))
        except nvml.NVMLError:
            pass  # not every device has all of it
        return Health(remapping_failed=remapping_failed, xids=tuple(xids))

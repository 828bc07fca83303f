"""How a thread waits for a CUDA device: asleep, so that the other workers have the core meanwhile.

By default CUDA keeps asking while there are cores enough, which answers some 0.2 ms sooner (H200, batch 1)
and takes a whole core a worker.
"""

from __future__ import annotations

import ctypes
import logging

import torch

logger = logging.getLogger(__name__)

_DRIVER_LIBRARY = "libcuda.so.1"
_SCHEDULE_BLOCKING_SYNC = 0x04  # CU_CTX_SCHED_BLOCKING_SYNC in cuda.h


def enable_blocking_sync(device: torch.device) -> bool:
    """Have all waits of this process for the device be asleep; whether that succeeded.

    It is a gain, no need: where the driver refuses, the process goes on as it is.
    """
    try:
        driver = ctypes.CDLL(_DRIVER_LIBRARY)
        handle = ctypes.c_int()
        results = (
            driver.cuInit(0),
            driver.cuDeviceGet(ctypes.byref(handle), device.index or 0),
            driver.cuDevicePrimaryCtxSetFlags_v2(handle, _SCHEDULE_BLOCKING_SYNC),
        )
    except (OSError, AttributeError) as error:
        logger.warning("the CUDA driver cannot be asked to wait asleep: %s", error)
        return False
    if any(results):
        logger.warning("the CUDA driver refused to wait asleep: results %s", results)
        return False
    return True

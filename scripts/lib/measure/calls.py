"""Calls to be timed: the network alone, and the whole detector."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lib.images import cycled
from lib.measure.timing import Call, interleaved_medians_s

from damoyolo.detector import Detector


def batch_seconds(
    detector: Detector, images: Sequence[bytes], batch_size: int, rounds: int = 5, slice_s: float = 0.3
) -> tuple[float, float]:
    """Median seconds of a batch: of the network (pixels to raw predictions), and of the whole detector."""
    medians_s = interleaved_medians_s(
        batch_calls(detector, images, batch_size), detector.device, rounds, slice_s
    )
    return medians_s["network"], medians_s["detector"]


def batch_calls(detector: Detector, images: Sequence[bytes], batch_size: int) -> dict[str, Call]:
    """The "network" alone and the whole "detector", each for one batch."""
    batch = cycled(images, batch_size)
    options = [detector.config.default_options()] * batch_size
    pipeline = detector.pipeline
    network = pipeline.network_call(detector.preprocessor.prepare(batch, pipeline.pixels).pixels)
    return {"network": network, "detector": functools.partial(detector.detect, batch, options)}

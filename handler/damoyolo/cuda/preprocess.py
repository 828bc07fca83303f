"""Decode and resize batches of images on a CUDA device.

Each image is sorted by its header. Plain baseline JPEG goes to nvJPEG, all of it in one call. All else (other
formats, progressive or CMYK JPEG, unusual or broken headers, sizes above the limits) goes at the same time to
the threads of `preprocess`, which decode it or report its error. One kernel then resizes both kinds into the
network's input.

nvJPEG repeats the chroma of 4:2:0 images where Pillow interpolates it, so pixel values differ a little.
A damaged image whose header is intact can differ more: each decoder fills gaps in its own way.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from damoyolo.config import ServingConfig
from damoyolo.cuda.jpeg import JpegHeader, decode_jpegs, read_plain_jpeg_header
from damoyolo.cuda.kernels.resize import resize_images
from damoyolo.errors import RequestError
from damoyolo.failures import Failure, classify
from damoyolo.formats import EncodedImage
from damoyolo.formats.essential import EssentialImage
from damoyolo.orientation import OrientedImage
from damoyolo.preprocess import (
    ImagePreprocessor,
    Loaded,
    PreparedBatch,
    resize_in_order,
    split_outcomes,
    upload,
)
from damoyolo.time_budget import TimeBudget

logger = logging.getLogger(__name__)

# Larger images are left to Pillow, whose own limit applies there.
MAX_DEVICE_PIXELS = 2**26


class DevicePreprocessor(ImagePreprocessor):
    """Decodes and resizes batches of images for one network on one CUDA device. Thread-safe.

    input_size_hw: height and width of the network input in pixels.
    time_budget: once it is spent, images are refused in place of decoded. None for no limit.
    """

    def __init__(
        self,
        config: ServingConfig,
        input_size_hw: tuple[int, int],
        device: torch.device,
        time_budget: TimeBudget | None = None,
    ) -> None:
        super().__init__(config, input_size_hw, device, time_budget)
        self._max_device_pixels = min(config.max_image_pixels, MAX_DEVICE_PIXELS)
        # nvJPEG's hardware writes its results when it is called, whatever is queued on the stream (seen on
        # H100), so it must never be given memory that a queued kernel has yet to read. The allocator keeps
        # memory apart by stream: decoded images live in that of a stream on which nothing else runs, and
        # return to it when an event shows that they have been read. High priority only because no other
        # part of the process takes streams from that pool.
        self._decode_stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._being_read: deque[tuple[torch.cuda.Event, list[OrientedImage]]] = deque()
        self._being_read_lock = threading.Lock()

    def prepare(self, encoded_images: Sequence[EncodedImage], out: Tensor | None = None) -> PreparedBatch:
        """Decode and resize all images at once; a bad one affects no other. An empty batch is fine.

        Waits for the JPEG decoder and for no other work on the device: the resizing is queued on the current
        stream.

        out: (at least B, 3, H, W) uint8 on the device, channels last in memory; its first rows are written
            and returned. New memory by default.
        """
        headers = {
            slot: header
            for slot, encoded in enumerate(encoded_images)
            if (header := self._header_for_device(encoded)) is not None
        }

        decoded_on_device: list[int] = []

        def load(slots: Sequence[int], rows: Tensor) -> Loaded:
            return self._load(encoded_images, slots, headers, reduced, rows, decoded_on_device)

        for_pool = {slot: encoded for slot, encoded in enumerate(encoded_images) if slot not in headers}
        reduced, errors = self._reduce_all(for_pool)
        needed = {slot: self._bytes_needed(image) for slot, image in reduced.items()}
        needed |= {slot: 3 * header.height * header.width for slot, header in headers.items()}
        batch = self._prepare_in_groups(needed, errors, out, load)
        return replace(batch, on_device=len(decoded_on_device))

    def _load(
        self,
        encoded_images: Sequence[EncodedImage],
        slots: Sequence[int],
        headers: Mapping[int, JpegHeader],
        reduced: Mapping[int, EssentialImage],
        rows: Tensor,
        decoded_on_device: list[int],
    ) -> Loaded:
        """Decode the images of some slots, on the device if they have a header, and resize them.

        decoded_on_device: the slots of those that the device decoded are appended.
        """
        in_pool = {slot: self._pool.submit(self._decode, reduced[slot]) for slot in slots if slot in reduced}
        for_device = {slot: headers[slot] for slot in slots if slot in headers}
        on_device = self._decode_on_device(encoded_images, for_device)
        decoded_on_device += on_device
        for slot in for_device.keys() - on_device.keys():
            in_pool[slot] = self._pool.submit(self._reduce_and_decode, encoded_images[slot])
        try:
            on_host, errors = split_outcomes((slot, in_pool[slot].result()) for slot in sorted(in_pool))
        finally:
            # After a failure of one the caller tries again with fewer; nothing may run on meanwhile.
            for future in in_pool.values():
                future.cancel()
            wait(in_pool.values())
        try:
            images = on_device | upload(on_host, self.device)
            resize_in_order(images, rows, resize_images)
        finally:
            self._keep_until_read(list(on_device.values()))
        sizes_hw = {slot: (reduced.get(slot) or headers[slot]).shown_size_hw for slot in sorted(images)}
        return sizes_hw, errors

    def _reduce_and_decode(self, encoded: EncodedImage) -> NDArray[np.uint8] | RequestError:
        image = self._reduce(encoded)
        return image if isinstance(image, RequestError) else self._decode(image)

    def _header_for_device(self, encoded: EncodedImage) -> JpegHeader | None:
        """None if the image is for the threads, which also report the limits that it exceeds."""
        if "JPEG" not in self.config.image_formats or len(encoded) > self.config.max_image_bytes:
            return None
        header = read_plain_jpeg_header(encoded)
        if header is None or header.height * header.width > self._max_device_pixels:
            return None
        return header if max(header.height, header.width) <= self.config.max_image_side else None

    def _decode_on_device(
        self, encoded_images: Sequence[EncodedImage], headers: dict[int, JpegHeader]
    ) -> dict[int, OrientedImage]:
        """The images that could be decoded, by slot: nvJPEG refuses a whole batch for one bad image."""
        if not headers or self._time_budget.is_spent():  # the threads then refuse the images
            return {}
        self._release_what_has_been_read()
        buffers = [_as_tensor(encoded_images[slot]) for slot in headers]
        try:
            with torch.cuda.stream(self._decode_stream):  # None has no effect
                planes = decode_jpegs(buffers, self.device)
        except RuntimeError as error:
            if classify(error, self.device) is not Failure.OTHER:
                raise
            logger.warning("nvJPEG refused a batch of %d (%s); decoding it on the CPU", len(buffers), error)
            return {}
        if self._decode_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._decode_stream)
        return {
            slot: OrientedImage(pixels.permute(1, 2, 0), header.orientation)  # (3, h, w) -> (h, w, 3)
            for (slot, header), pixels in zip(headers.items(), planes, strict=True)
            if pixels.shape == (3, header.height, header.width)
        }

    def _keep_until_read(self, decoded: list[OrientedImage]) -> None:
        """Hold the images' memory until the current stream has passed this point."""
        if self._decode_stream is None or not decoded:
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        with self._being_read_lock:
            self._being_read.append((event, decoded))

    def _release_what_has_been_read(self) -> None:
        with self._being_read_lock:
            while self._being_read and self._being_read[0][0].query():  # type: ignore[no-untyped-call]
                self._being_read.popleft()


def _as_tensor(encoded: EncodedImage) -> Tensor:
    """The bytes as uint8; a bytearray, which TorchServe delivers, is not copied."""
    # torch warns about memory that is read-only.
    writable = encoded if isinstance(encoded, bytearray) else bytearray(encoded)
    return torch.frombuffer(writable, dtype=torch.uint8)

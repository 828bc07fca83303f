"""Encoded images -> network input on a CUDA device, whose JPEG engines decode what they are sure of.

A scan of its header sorts every image: plain baseline JPEG goes to nvJPEG, all of it in one call; all
else (other formats, progressive or CMYK JPEG, odd or broken headers, sizes above the limits) goes at the same
time to the threads of `preprocess`, which decode it or find its error. One kernel then resizes both kinds
into the network's input.

nvJPEG repeats the chroma of 4:2:0 images where Pillow interpolates it, so pixels differ by a few levels.
A broken image within an intact frame of markers can differ more: either decoder fills in what it likes.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torchvision.io import ImageReadMode  # importing it registers the operator used below

from damoyolo.config import ServingConfig
from damoyolo.cuda.kernels.resize import OrientedImage, resize_images
from damoyolo.errors import RequestError
from damoyolo.preprocess import EncodedImage, ImagePreprocessor, PreparedBatch, upload

logger = logging.getLogger(__name__)

# Larger images are left to Pillow, which has a limit of its own there.
LARGEST_DEVICE_PIXELS = 2**26

_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"
_BASELINE_FRAME = 0xC0
_HUFFMAN_TABLES = 0xC4
_START_OF_SCAN = 0xDA
_QUANTIZATION_TABLES = 0xDB
_EXIF_OR_XMP = 0xE1
_ADOBE = 0xEE
# Restart interval, other application data, comment: nothing in them changes how pixels are decoded.
_HARMLESS = frozenset((0xDD, 0xE0, *range(0xE2, 0xEE), 0xEF, 0xFE))
# Bytes of padding tolerated behind the end of the image.
_MOST_PADDING = 32
# A bound on the work for a header that is nothing but tiny segments.
_MOST_SEGMENTS = 100

_SEGMENT = struct.Struct(">BBH")  # 0xFF, marker, length with these two bytes
_FRAME = struct.Struct(">BHHB")  # bits a sample, height, width, components
# Number and sampling factors (horizontal, vertical) of Y, Cb and Cr in 4:4:4, 4:2:2 and 4:2:0.
_COLOUR_LAYOUTS = frozenset((1, luma, 2, 0x11, 3, 0x11) for luma in (0x11, 0x21, 0x22))
_GREY_SAMPLING = 0x11

_ORIENTATION_TAG = 0x0112
_SHORT = 3


class JpegHeader(NamedTuple):
    """Size in pixels as stored, and EXIF orientation 1..8."""

    height: int
    width: int
    orientation: int


def read_plain_jpeg_header(encoded: EncodedImage) -> JpegHeader | None:
    """The header of a JPEG that nvJPEG surely decodes to the image that Pillow shows; None for all else.

    Accepted: baseline, Huffman-coded, 8 bits, one interleaved scan, grey or Y'CbCr in 4:4:4, 4:2:2 or 4:2:0,
    complete to its end marker, nothing unusual between the segments. Never raises, whatever the bytes.
    """
    try:
        return _read_header(memoryview(encoded).cast("B"))
    except (struct.error, IndexError, TypeError):  # ends early; TypeError: bytes with gaps between them
        return None


def _read_header(data: memoryview) -> JpegHeader | None:
    if bytes(data[:2]) != _START_OF_IMAGE or _END_OF_IMAGE not in bytes(data[-_MOST_PADDING:]):
        return None
    size_hw: tuple[int, int] | None = None
    components = 0
    orientation: int | None = None
    adobe_transform: int | None = None
    xmp_orientation = False
    tables = set()
    position = 2
    for _ in range(_MOST_SEGMENTS):
        prefix, marker, length = _SEGMENT.unpack_from(data, position)
        if prefix != 0xFF or length < 2:
            return None
        start, position = position + 4, position + 2 + length
        if marker == _START_OF_SCAN:
            break
        if marker in (_HUFFMAN_TABLES, _QUANTIZATION_TABLES):
            tables.add(marker)
        elif marker == _BASELINE_FRAME:
            # A second frame is how to smuggle in another size.
            if size_hw is not None:
                return None
            bits, height, width, components = _FRAME.unpack_from(data, start)
            layout = data[start + _FRAME.size : position]
            if bits != 8 or not height or not width or not _is_known_layout(layout, components):
                return None
            size_hw = (height, width)
        elif marker == _EXIF_OR_XMP:
            segment = bytes(data[start:position])
            if segment.startswith(b"Exif\0\0"):
                if orientation is not None:  # Pillow strings several such segments together
                    return None
                orientation = _read_orientation(segment[6:])
                if orientation is None:
                    return None
            elif b"Orientation" in segment:
                xmp_orientation = True
        elif marker == _ADOBE:
            if bytes(data[start : start + 5]) == b"Adobe":
                adobe_transform = data[start + 11]
        elif marker not in _HARMLESS:
            return None
    else:
        return None
    if size_hw is None or len(tables) < 2 or data[start] != components:  # not one scan of all components
        return None
    if components == 3 and adobe_transform not in (None, 1):  # stored as R, G, B
        return None
    if xmp_orientation and not orientation:  # Pillow then takes it from there
        return None
    if orientation is None or not 1 <= orientation <= 8:  # viewers leave such an image upright
        orientation = 1
    return JpegHeader(*size_hw, orientation)


def _is_known_layout(layout: memoryview, components: int) -> bool:
    if components == 1:
        return len(layout) == 3 and layout[1] == _GREY_SAMPLING
    if components == 3 and len(layout) == 9:
        return (*layout[0:2], *layout[3:5], *layout[6:8]) in _COLOUR_LAYOUTS
    return False


def _read_orientation(tiff: bytes) -> int | None:
    """Orientation of the main image in EXIF data, 0 where there is none; None if they are irregular."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    table = tiff[directory + 2 : directory + 2 + 12 * entries]
    if len(table) != 12 * entries:
        return None
    found = [entry for entry in struct.iter_unpack(order + "HHIHxx", table) if entry[0] == _ORIENTATION_TAG]
    if not found:
        return 0
    (_, kind, count, value), *others = found
    return value if kind == _SHORT and count == 1 and not others else None


def decode_jpegs(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEGs with nvJPEG, in hardware where there is some; returns when all are decoded.

    encoded: bytes of each image, uint8 on the CPU.

    Returns:
        (3, h, w) uint8 R, G, B on the device for each, in memory of the current stream.

    Raises:
        RuntimeError: one of them, it does not say which, cannot be decoded.
    """
    # This is torchvision.io.decode_jpeg without its warning at each call (since 0.29).
    return cast(list[Tensor], torch.ops.image.decode_jpegs_cuda(encoded, ImageReadMode.RGB.value, device))


class DevicePreprocessor(ImagePreprocessor):
    """Decodes and resizes batches of images for one network on one CUDA device. Thread-safe.

    input_size_hw: height and width of the network input in pixels.
    """

    def __init__(self, config: ServingConfig, input_size_hw: tuple[int, int], device: torch.device) -> None:
        super().__init__(config, input_size_hw, device)
        self._largest_device_pixels = min(config.max_image_pixels, LARGEST_DEVICE_PIXELS)
        # nvJPEG's hardware writes its results when it is called, whatever is queued on the stream (seen on
        # H100), so it must never be given memory that a queued kernel has yet to read. The allocator keeps
        # memory apart by stream: decoded images live in that of a stream on which nothing else runs, and
        # go back to it when an event tells that they have been read. High priority only because no other
        # part of the process takes streams from that pool.
        self._decode_stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._being_read: deque[tuple[torch.cuda.Event, list[OrientedImage]]] = deque()
        self._being_read_lock = threading.Lock()

    def prepare(self, encoded_images: Sequence[EncodedImage], out: Tensor | None = None) -> PreparedBatch:
        """Decode and resize all images at once; a bad one costs only itself. An empty batch is fine.

        Waits for the JPEG decoder, for no other work on the device: the resizing is queued on the current
        stream.

        out: (at least B, 3, H, W) uint8 on the device, channels last in memory; its first rows are written
            and returned. New memory by default.
        """
        headers = {
            slot: header
            for slot, encoded in enumerate(encoded_images)
            if (header := self._header_for_device(encoded)) is not None
        }
        in_pool = {
            slot: self._pool.submit(self._decode, encoded)
            for slot, encoded in enumerate(encoded_images)
            if slot not in headers
        }
        decoded = self._decode_on_device(encoded_images, headers)
        for slot in headers.keys() - decoded.keys():
            in_pool[slot] = self._pool.submit(self._decode, encoded_images[slot])
        outcomes = {slot: in_pool[slot].result() for slot in sorted(in_pool)}

        pixels_by_slot = {
            slot: image for slot, image in outcomes.items() if not isinstance(image, RequestError)
        }
        uploaded = upload(list(pixels_by_slot.values()), self.device)
        images = decoded | {
            slot: OrientedImage(pixels) for slot, pixels in zip(pixels_by_slot, uploaded, strict=True)
        }
        slots = sorted(images)
        in_order = [images[slot] for slot in slots]
        rows = self._rows(len(slots), out)
        try:
            resize_images(in_order, rows)
        finally:
            self._keep_until_read(list(decoded.values()))
        return PreparedBatch(
            pixels=rows.permute(0, 3, 1, 2),  # (B, H, W, 3) -> (B, 3, H, W)
            image_sizes_hw=[image.oriented_size_hw for image in in_order],
            slots=slots,
            errors={slot: error for slot, error in outcomes.items() if isinstance(error, RequestError)},
        )

    def _header_for_device(self, encoded: EncodedImage) -> JpegHeader | None:
        """None if the image is for the threads, which also word the errors about limits."""
        if "JPEG" not in self.config.image_formats or len(encoded) > self.config.max_image_bytes:
            return None
        header = read_plain_jpeg_header(encoded)
        if header is None or header.height * header.width > self._largest_device_pixels:
            return None
        return header

    def _decode_on_device(
        self, encoded_images: Sequence[EncodedImage], headers: dict[int, JpegHeader]
    ) -> dict[int, OrientedImage]:
        """The images that could be decoded, by slot: nvJPEG gives up a batch for one bad image."""
        if not headers:
            return {}
        self._release_what_has_been_read()
        buffers = [_as_tensor(encoded_images[slot]) for slot in headers]
        try:
            with torch.cuda.stream(self._decode_stream):  # no stream, no effect
                planes = decode_jpegs(buffers, self.device)
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            logger.warning("nvJPEG refused a batch of %d (%s); decoding it on the CPU", len(buffers), error)
            return {}
        if self._decode_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._decode_stream)
        return {
            slot: OrientedImage(pixels.permute(1, 2, 0), header.orientation)  # (3, h, w) -> (h, w, 3)
            for (slot, header), pixels in zip(headers.items(), planes, strict=True)
            if pixels.shape == (3, header.height, header.width)
        }

    def _rows(self, count: int, out: Tensor | None) -> Tensor:
        """(count, H, W, 3) contiguous uint8 on the device."""
        if out is None:
            return torch.empty((count, *self.input_size_hw, 3), dtype=torch.uint8, device=self.device)
        rows = out[:count].permute(0, 2, 3, 1)  # (B, 3, H, W) -> (B, H, W, 3)
        if rows.shape != (count, *self.input_size_hw, 3) or not rows.is_contiguous():
            raise ValueError(
                f"out is {tuple(out.shape)} with strides {out.stride()}; needed are {count} images or more "
                f"of (3, {self.input_size_hw[0]}, {self.input_size_hw[1]}), channels last in memory"
            )
        return rows

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
    """The bytes as uint8; a bytearray, which is what TorchServe delivers, is not copied."""
    # torch warns about memory that is read-only.
    writable = encoded if isinstance(encoded, bytearray) else bytearray(encoded)
    return torch.frombuffer(writable, dtype=torch.uint8)

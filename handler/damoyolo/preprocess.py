"""Encoded images -> one batch of network-sized pixels on the device, and the geometry to undo it.

Two steps that know nothing of each other: decoding (`decode_image`, in a pool of threads; Pillow releases
the interpreter lock) and resizing (`_resize_into` in the same threads for a network on the CPU,
`resize_on_device` for one on a GPU). Both resize as upstream does (damo/utils/demo_utils.py): bilinear,
half-pixel centres, no antialiasing, aspect ratio not kept, rounded to grey levels 0..255; they agree with
OpenCV's INTER_LINEAR within one level.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from damoyolo.config import ServingConfig
from damoyolo.cuda.kernels.resize import OrientedImage, resize_images_reference
from damoyolo.errors import CorruptImageError, ImageTooLargeError, RequestError, UnsupportedImageError

EncodedImage = bytes | bytearray | memoryview

# What a viewer does for each EXIF orientation (EXIF 2.32, tag 0x0112); 1 is upright.
_EXIF_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Warning filters belong to the whole process: one thread at a time may change them.
_warning_filters_lock = threading.Lock()


@dataclass(frozen=True)
class PreparedBatch:
    """The images of a batch that could be decoded, ready for the network, and what became of the rest.

    pixels: (B, 3, H, W) uint8 R, G, B on the device, grey levels 0..255, channels last in memory.
    image_sizes_hw: B times height and width of the image as a viewer shows it.
    slots: B positions in the sequence given to `prepare`, ascending.
    errors: position -> error of every other image.
    """

    pixels: Tensor
    image_sizes_hw: list[tuple[int, int]]
    slots: list[int]
    errors: dict[int, RequestError]


class ImagePreprocessor:
    """Decodes and resizes batches of images for one network on one device. Thread-safe.

    input_size_hw: height and width of the network input in pixels.
    """

    def __init__(self, config: ServingConfig, input_size_hw: tuple[int, int], device: torch.device) -> None:
        self.config = config
        self.input_size_hw = input_size_hw
        self.device = device
        cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(config.decode_threads or cores, thread_name_prefix="decode")
        Image.init()  # import the readers of rarer formats now, not while a request waits

    def prepare(self, encoded_images: Sequence[EncodedImage], out: Tensor | None = None) -> PreparedBatch:
        """Decode and resize all images at once; a bad one costs only itself. An empty batch is fine.

        On a GPU the copy and the resizing are only queued: nothing here waits for the device.

        out: (at least B, 3, H, W) uint8 on the device; its first rows are written and returned. New memory by
            default.
        """
        if self.device.type == "cpu":
            return self._prepare_on_cpu(encoded_images)
        outcomes = list(self._pool.map(self._decode, encoded_images))
        images = [outcome for outcome in outcomes if not isinstance(outcome, RequestError)]
        pixels = resize_on_device(images, self.input_size_hw, self.device)
        return PreparedBatch(
            pixels=pixels if out is None else out[: len(images)].copy_(pixels),
            image_sizes_hw=[(image.shape[0], image.shape[1]) for image in images],
            slots=[slot for slot, outcome in enumerate(outcomes) if not isinstance(outcome, RequestError)],
            errors={slot: error for slot, error in enumerate(outcomes) if isinstance(error, RequestError)},
        )

    def close(self) -> None:
        """End the threads; images already begun are finished."""
        self._pool.shutdown()

    def _prepare_on_cpu(self, encoded_images: Sequence[EncodedImage]) -> PreparedBatch:
        # Each thread resizes what it decoded while that is in its cache, and large images do not pile up.
        canvas = torch.empty((len(encoded_images), *self.input_size_hw, 3), dtype=torch.uint8)

        def fill(encoded: EncodedImage, target: Tensor) -> tuple[int, int] | RequestError:
            image = self._decode(encoded)
            if isinstance(image, RequestError):
                return image
            _resize_into(image, target)
            return image.shape[0], image.shape[1]

        outcomes = list(self._pool.map(fill, encoded_images, canvas))
        slots = [slot for slot, outcome in enumerate(outcomes) if not isinstance(outcome, RequestError)]
        if len(slots) < len(outcomes):
            canvas = canvas[slots]
        return PreparedBatch(
            pixels=canvas.permute(0, 3, 1, 2),  # (B, H, W, 3) -> (B, 3, H, W)
            image_sizes_hw=[size for size in outcomes if not isinstance(size, RequestError)],
            slots=slots,
            errors={slot: error for slot, error in enumerate(outcomes) if isinstance(error, RequestError)},
        )

    def _decode(self, encoded: EncodedImage) -> NDArray[np.uint8] | RequestError:
        try:
            return decode_image(encoded, self.config)
        except RequestError as error:
            return error


def scale_factors_xyxy(
    image_sizes_hw: Sequence[tuple[int, int]], input_size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """(B, 4) float32: network-input pixels times this are pixels of the original image.

    The inverse of the resizing in this file, for boxes as x1, y1, x2, y2; no shift takes part, since pixel
    (0, 0) reaches from 0 to 1 in both images.
    """
    factors_yx = np.array(image_sizes_hw, dtype=np.float64).reshape(-1, 2) / input_size_hw
    return np.tile(factors_yx[:, ::-1], 2).astype(np.float32)  # (B, 2) y, x -> (B, 4) x, y, x, y


def resize_on_device(
    images: Sequence[NDArray[np.uint8]], input_size_hw: tuple[int, int], device: torch.device
) -> Tensor:
    """Copy decoded images to the device in one piece and resize them there, without waiting for it.

    Args:
        images: B images (h, w, 3) uint8 of any sizes.

    Returns:
        (B, 3, H, W) uint8 on the device, channels last in memory.
    """
    canvas = torch.empty((len(images), *input_size_hw, 3), dtype=torch.uint8, device=device)
    resize_images_reference([OrientedImage(pixels) for pixels in upload(images, device)], canvas)
    return canvas.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)


def upload(images: Sequence[NDArray[np.uint8]], device: torch.device) -> list[Tensor]:
    """Copy decoded images (h, w, 3) uint8 to the device in one piece, without waiting for it."""
    # PyTorch's allocator of pinned memory does not reuse it before the copy has read it.
    packed = torch.empty(
        sum(image.size for image in images), dtype=torch.uint8, pin_memory=device.type == "cuda"
    )
    packed_values = packed.numpy()
    ends = np.cumsum([0, *(image.size for image in images)]).tolist()
    for image, start, end in zip(images, ends, ends[1:], strict=False):
        packed_values[start:end].reshape(image.shape)[...] = image
    packed = packed.to(device, non_blocking=True)
    return [
        packed[start:end].view(image.shape) for image, start, end in zip(images, ends, ends[1:], strict=False)
    ]


def _resize_into(image: NDArray[np.uint8], target: Tensor) -> None:
    """Resize one image (h, w, 3) on the CPU into `target` (H, W, 3), both uint8.

    PyTorch's uint8 kernel for channels-last images is the fastest exact enough one (640x480: 1.4 ms,
    against 4.6 ms in float32) and runs in the calling thread alone, so it does not fight the pool.
    """
    if image.shape == target.shape:
        target.numpy()[...] = image
        return
    source = torch.empty(image.shape, dtype=torch.uint8)
    source.numpy()[...] = image  # an array of Pillow's is read-only, which torch.from_numpy warns about
    resized = F.interpolate(
        source.permute(2, 0, 1)[None],  # (h, w, 3) -> (1, 3, h, w)
        size=(target.shape[0], target.shape[1]),
        mode="bilinear",
        align_corners=False,
    )
    target.copy_(resized[0].permute(1, 2, 0))  # (1, 3, H, W) -> (H, W, 3)


def decode_image(encoded: EncodedImage, config: ServingConfig) -> NDArray[np.uint8]:
    """Decode one image as a viewer shows it: EXIF orientation applied, first frame of several.

    Transparency is dropped, not blended, as upstream's `convert("RGB")` does; 16-bit grey is scaled to 8
    bits; CMYK, palette, grey and 1-bit images become RGB.

    Returns:
        (h, w, 3) uint8 R, G, B; may be read-only.

    Raises:
        UnsupportedImageError: not an image of a format in `config.image_formats`.
        ImageTooLargeError: more bytes or pixels than `config.max_image_bytes`, `config.max_image_pixels`.
        CorruptImageError: the header is fine, the rest is not.
    """
    require_image_bytes(len(encoded), config)
    try:
        with _open(encoded, config) as opened:
            _require_image_pixels(opened, config)
            opened.load()
            transposition = _EXIF_TRANSPOSITIONS.get(_exif_orientation(opened))
            image = _to_rgb(opened)
            if transposition is not None:
                image = image.transpose(transposition)
            return np.asarray(image)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"the image has too many pixels: {_reason(error)} No setting of the server lifts this limit."
        ) from error
    except MemoryError as error:
        raise ImageTooLargeError(
            "there is not enough memory to decode the image; "
            "the server's settings max_image_pixels and decode_threads bound what decoding needs"
        ) from error
    # Pillow's readers answer hostile bytes with nearly any exception: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, EOFError, IndexError, KeyError, TypeError, OverflowError ...
    except Exception as error:
        raise CorruptImageError(f"the image cannot be decoded: {_reason(error)}") from error


def require_image_bytes(size_bytes: int, config: ServingConfig) -> None:
    """Refuse an encoded image that is too large.

    Raises:
        ImageTooLargeError: names the size and the setting.
    """
    if size_bytes > config.max_image_bytes:
        raise ImageTooLargeError(
            f"the image has {size_bytes} bytes; at most {config.max_image_bytes} are accepted "
            "(server setting max_image_bytes)"
        )


def _open(encoded: EncodedImage, config: ServingConfig) -> ImageFile.ImageFile:
    """Read the header only."""
    try:
        with _warnings_ignored():
            return Image.open(io.BytesIO(encoded), formats=config.image_formats)
    except UnidentifiedImageError as error:
        raise UnsupportedImageError(
            "the data are no image of an accepted format, or its header is broken; "
            f"accepted are {', '.join(config.image_formats)} (server setting image_formats)"
        ) from error


def _require_image_pixels(image: Image.Image, config: ServingConfig) -> None:
    width, height = image.size
    if width * height > config.max_image_pixels:
        raise ImageTooLargeError(
            f"the image has {width} x {height} = {width * height} pixels; "
            f"at most {config.max_image_pixels} are accepted (server setting max_image_pixels)"
        )


def _exif_orientation(image: Image.Image) -> int:
    """1..8; needs the loaded image, for PNG may carry EXIF data behind the pixels."""
    try:
        with _warnings_ignored():
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # viewers show an image whose EXIF data are broken, so it is upright
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # convert() would cut everything above 255
        levels = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnsupportedImageError(
            f"the image has signed or 32-bit pixels (Pillow mode {image.mode}), of undefined range; "
            "accepted are images of 1, 8 or 16 bits a channel"
        )
    image.info.pop("transparency", None)  # dropped anyhow; convert() warns about some forms of it
    return image.convert("RGB")


@contextmanager
def _warnings_ignored() -> Iterator[None]:
    """Keep Pillow from warning about what a client sent; the limits are enforced here."""
    with _warning_filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    """The text of a foreign error, ASCII and bounded, for it may quote the client's data."""
    return ascii(str(error) or type(error).__name__)[1:-1][:160]

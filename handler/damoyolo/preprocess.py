"""Turn encoded images into one batch of network-sized pixels on the device, and map boxes back.

Images are decoded in a pool of threads (Pillow releases the interpreter lock). They are resized in the same
threads for a network on the CPU, and on the device for one on a GPU. Both resize as upstream does
(damo/utils/demo_utils.py): bilinear, half-pixel centres, no antialiasing, aspect ratio not kept, rounded to
uint8; they agree with OpenCV's INTER_LINEAR to within 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from damoyolo.config import ServingConfig
from damoyolo.cores import usable_cores
from damoyolo.decode import decode_reduced, prepare_decoders
from damoyolo.errors import RequestError
from damoyolo.formats import EncodedImage, reduce_image
from damoyolo.formats.essential import EssentialImage
from damoyolo.memory_budget import MemoryBudget
from damoyolo.orientation import OrientedImage, shown_pixels
from damoyolo.time_budget import TimeBudget

T = TypeVar("T")
# Sizes (height, width) and errors, by slot.
Loaded = tuple[dict[int, tuple[int, int]], dict[int, RequestError]]


@dataclass(frozen=True)
class PreparedBatch:
    """The images of a batch that could be decoded, ready for the network, and the errors of the others.

    pixels: (B, 3, H, W) uint8 R, G, B on the device, channels last in memory.
    image_sizes_hw: B times height and width of the image as a viewer shows it.
    slots: B positions in the sequence given to `prepare`, ascending.
    errors: position -> error of every other image.
    on_device: how many images the device decoded, not the CPU.
    """

    pixels: Tensor
    image_sizes_hw: list[tuple[int, int]]
    slots: list[int]
    errors: dict[int, RequestError]
    on_device: int = 0


class ImagePreprocessor:
    """Decodes and resizes batches of images for one network on one device. Thread-safe.

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
        self.config = config
        self.input_size_hw = input_size_hw
        self.device = device
        cores = usable_cores()
        self._pool = ThreadPoolExecutor(config.decode_threads or cores, thread_name_prefix="decode")
        self._budget = MemoryBudget(config.max_decode_bytes)
        self._time_budget = time_budget or TimeBudget()
        share = config.scaled_jpeg_decoding
        self._least_hw = (share * input_size_hw[0], share * input_size_hw[1]) if share else None
        prepare_decoders()  # now, not during a request

    def prepare(self, encoded_images: Sequence[EncodedImage], out: Tensor | None = None) -> PreparedBatch:
        """Decode and resize all images at once; a bad one affects no other. An empty batch is fine.

        On a GPU the copy and the resizing are only queued: nothing here waits for the device.

        out: (at least B, 3, H, W) uint8 on the device, channels last in memory; its first rows are written
            and returned. New memory by default, and always on a CPU.
        """
        if self.device.type == "cpu":
            return self._prepare_on_cpu(encoded_images)
        return self._prepare_on_device(encoded_images, out)

    def close(self) -> None:
        """End the threads; images already begun are finished."""
        self._pool.shutdown()

    def _prepare_on_cpu(self, encoded_images: Sequence[EncodedImage]) -> PreparedBatch:
        # Each thread resizes what it decoded while that is in its cache, and large images do not pile up.
        canvas = torch.empty((len(encoded_images), *self.input_size_hw, 3), dtype=torch.uint8)

        def fill(encoded: EncodedImage, target: Tensor) -> tuple[int, int]:
            reduced = reduce_image(encoded, self.config)
            with self._budget.reserve(self._bytes_needed(reduced)):
                _resize_into(self._decode_in_time(reduced), target)
            return reduced.shown_size_hw

        outcomes = self._pool.map(outcome_of(fill), encoded_images, canvas)
        sizes_hw, errors = split_outcomes(enumerate(outcomes))
        slots = list(sizes_hw)
        if errors:
            canvas = canvas[slots]
        pixels = canvas.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
        return PreparedBatch(pixels, list(sizes_hw.values()), slots, errors)

    def _prepare_on_device(self, encoded_images: Sequence[EncodedImage], out: Tensor | None) -> PreparedBatch:
        def load(slots: Sequence[int], rows: Tensor) -> Loaded:
            outcomes = self._pool.map(self._decode, [reduced[slot] for slot in slots])
            decoded, errors = split_outcomes(zip(slots, outcomes, strict=True))
            images = upload(decoded, self.device)
            resize_in_order(images, rows, resize_reference)
            return {slot: reduced[slot].shown_size_hw for slot in sorted(images)}, errors

        reduced, errors = self._reduce_all(dict(enumerate(encoded_images)))
        needed = {slot: self._bytes_needed(image) for slot, image in reduced.items()}
        return self._prepare_in_groups(needed, errors, out, load)

    def _prepare_in_groups(
        self,
        needed_bytes: Mapping[int, int],
        errors: dict[int, RequestError],
        out: Tensor | None,
        load: Callable[[Sequence[int], Tensor], Loaded],
    ) -> PreparedBatch:
        """Prepare as many images together as fit the memory, which are usually all of a batch.

        needed_bytes: by slot, of the images that are not refused already. errors: of the others.
        load: decodes the images of some slots and resizes them into the first of the given rows.
        """
        rows = self._rows(len(needed_bytes), out)
        sizes_hw: dict[int, tuple[int, int]] = {}
        for slots in self._budget.groups(sorted(needed_bytes.items())):
            if sizes_hw and self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # frees what the last group needed
            loaded, failed = load(slots, rows[len(sizes_hw) :])
            sizes_hw |= loaded
            errors |= failed
        pixels = rows[: len(sizes_hw)].permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
        return PreparedBatch(pixels, list(sizes_hw.values()), list(sizes_hw), dict(sorted(errors.items())))

    def _reduce_all(
        self, encoded_images: Mapping[int, EncodedImage]
    ) -> tuple[dict[int, EssentialImage], dict[int, RequestError]]:
        """What decoding needs of each image, and the errors of those that their structure shows to be bad."""
        outcomes = self._pool.map(self._reduce, encoded_images.values())
        return split_outcomes(zip(encoded_images, outcomes, strict=True))

    def _reduce(self, encoded: EncodedImage) -> EssentialImage | RequestError:
        return outcome_of(reduce_image)(encoded, self.config)

    def _decode(self, image: EssentialImage) -> NDArray[np.uint8] | RequestError:
        with self._budget.reserve(image.decoding_bytes):
            return outcome_of(self._decode_in_time)(image)

    def _decode_in_time(self, image: EssentialImage) -> NDArray[np.uint8]:
        """Call with the memory reserved, because waiting for it takes time too."""
        self._time_budget.check()
        return decode_reduced(image, self.config, self._least_hw)

    def _bytes_needed(self, image: EssentialImage) -> int:
        """To decode and resize it: resizing first makes an image of its height and the network's width."""
        return image.decoding_bytes + 3 * max(image.size_wh) * self.input_size_hw[1]

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


def scale_factors_xyxy(
    image_sizes_hw: Sequence[tuple[int, int]], input_size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """(B, 4) float32: boxes x1, y1, x2, y2 in pixels of the network input times this are in image pixels.

    The inverse of the resizing in this file. There is no offset: pixel (0, 0) spans 0 to 1 in both images.

    image_sizes_hw: B heights and widths in pixels of the original images as a viewer shows them.
    """
    factors_yx = np.array(image_sizes_hw, dtype=np.float64).reshape(-1, 2) / input_size_hw
    return np.tile(factors_yx[:, ::-1], 2).astype(np.float32)  # (B, 2) y, x -> (B, 4) x, y, x, y


def outcome_of(function: Callable[..., T]) -> Callable[..., T | RequestError]:
    """The function with its errors of requests as results."""

    def call(*arguments: object) -> T | RequestError:
        try:
            return function(*arguments)
        except RequestError as error:
            return error

    return call


def split_outcomes(
    outcomes: Iterable[tuple[int, T | RequestError]],
) -> tuple[dict[int, T], dict[int, RequestError]]:
    """Successes and errors of (slot, outcome), each by slot."""
    successes: dict[int, T] = {}
    errors: dict[int, RequestError] = {}
    for slot, outcome in outcomes:
        if isinstance(outcome, RequestError):
            errors[slot] = outcome
        else:
            successes[slot] = outcome
    return successes, errors


def upload(images: Mapping[int, NDArray[np.uint8]], device: torch.device) -> dict[int, OrientedImage]:
    """Copy decoded images (h, w, 3) uint8 to the device in one piece, without waiting for it."""
    sizes = [image.size for image in images.values()]
    # PyTorch's allocator of pinned memory does not reuse it before the copy has read it.
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for image, part in zip(images.values(), torch.split(packed, sizes), strict=True):
        part.numpy().reshape(image.shape)[...] = image
    uploaded = torch.split(packed.to(device, non_blocking=True), sizes)
    return {
        slot: OrientedImage(part.view(image.shape))
        for (slot, image), part in zip(images.items(), uploaded, strict=True)
    }


def resize_in_order(
    images: Mapping[int, OrientedImage],
    rows: Tensor,
    resize: Callable[[Sequence[OrientedImage], Tensor], None],
) -> None:
    """Resize images on the device, in the order of their slots, into the first rows."""
    resize([images[slot] for slot in sorted(images)], rows[: len(images)])


def resize_reference(images: Sequence[OrientedImage], out: Tensor) -> None:
    """Resize every image to the size of `out`, as a viewer shows it, one by one in plain torch.

    images: B images of any sizes on the device of `out`.
    out: (B, H, W, 3) uint8; overwritten.
    """
    for image, target in zip(images, out, strict=True):
        source = shown_pixels(image)
        if source.shape == target.shape:
            target.copy_(source)
            continue
        values = F.interpolate(
            source.permute(2, 0, 1)[None].float(),  # (h, w, 3) -> (1, 3, h, w)
            size=(target.shape[0], target.shape[1]),
            mode="bilinear",
            align_corners=False,
        )
        target.copy_(values[0].round_().permute(1, 2, 0))  # (1, 3, H, W) -> (H, W, 3)


def _resize_into(image: NDArray[np.uint8], target: Tensor) -> None:
    """Resize one image (h, w, 3) on the CPU into `target` (H, W, 3), both uint8.

    PyTorch's uint8 kernel for channels-last images is the fastest that is exact enough (640x480: 1.4 ms,
    against 4.6 ms in float32) and runs in the calling thread alone, so it does not compete with the pool.
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

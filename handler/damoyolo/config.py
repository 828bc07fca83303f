"""Define the serving settings; no other place states a default."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from damoyolo.errors import ConfigError
from damoyolo.structures import DetectionOptions

SETTINGS_FILE = "model-config.yaml"
MANIFEST_FILE = "MAR-INF/MANIFEST.json"
DEFAULT_RESPONSE_TIMEOUT_S = 120  # TorchServe's, for a model-config.yaml without one
BACKENDS = ("auto", "pytorch", "onnxruntime", "openvino", "tensorrt")
PRECISIONS = ("auto", "fp32", "tf32", "amp", "fp16", "bf16")
CUDA_SYNCS = ("auto", "blocking", "spin")
MAX_BATCH_SECONDS = 86_400.0
# Former names, refused with the present one.
RENAMED_SETTINGS = {"device_wait": "cuda_sync (and its value sleep is now blocking)"}
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # names as Pillow gives them


@dataclass(frozen=True)
class ServingConfig:
    """The settings in the `handler:` section of model-config.yaml.

    variant: name of a published DAMO-YOLO variant.
    class_names: one name per class, in the order of the network's channels.
    input_size_hw: height and width of the network input in pixels, multiples of 32; None takes the
        variant's own.
    backend: library that runs the network; "auto" is PyTorch on CUDA, and on a CPU OpenVINO if it is
        installed.
    precision: arithmetic of the network; "auto" takes the fastest that keeps accuracy on the device.
    score_threshold, iou_threshold, max_detections: defaults for what a request leaves out.
    max_detections_limit: largest max_detections of a request.
    max_candidates: how many candidates of an image enter NMS, the best ones; bounds its work.
    max_image_bytes: largest encoded image. max_image_pixels: largest width times height.
    max_image_side: largest width and height. Resizing takes memory for the height times the width of the
        network's input.
    max_image_parts: most segments, chunks, blocks, directory entries, strips or tiles that an image file may
        have in or before its first frame; bounds the work of reading it.
    max_jpeg_scan_pixels: largest product of the pixels and the scans of a progressive JPEG, because every
        scan passes over all pixels; an encoder writes about 10 scans.
    max_rle_pixels: largest BMP coded in run lengths, in pixels and in bytes, which Pillow decodes in Python.
    max_instances: most images in one JSON request. max_instances_pixels: most pixels of all of them.
    max_decode_bytes: memory for the images of a batch that are decoded, resized or drawn at the same time,
        in a worker, and on CUDA for the pixels on their way to the device and there; images wait until there
        is room, and one that needs more is processed alone.
    max_response_bytes: largest answer; keep it below the server's max_response_size, beyond which the
        server ends the worker.
    max_batch_seconds: after this time since a batch began, no further image is decoded, drawn or given to the
        network, and its request gets 503; 0 is no limit. A worker takes a third of the model's
        responseTimeout, at which the server ends it, unless the archive sets this.
    image_formats: accepted image formats, named as Pillow names them.
    decode_threads: images decoded at the same time in a worker; 0 takes one per core.
    compute_threads: threads of the network on a CPU; 0 takes the cores divided by maxWorkers.
    warmup_batch_sizes: batch sizes run once before a worker reports ready; 1 and 2 by default where the
        archive batches requests.
    cuda_graphs: on CUDA in fp16 or bf16, run the fused network and postprocessing of fixed shapes as CUDA
        graphs (docs/performance.md has the gain); off is plain PyTorch.
    graph_batch_sizes: batch sizes to capture; a batch is padded to the next, a larger one is split.
    cuda_sync: how a worker waits for a CUDA device: "blocking" sleeps and leaves its core to others, "spin"
        keeps the core busy and resumes about 0.2 ms earlier; "auto" spins if the workers need at most half
        of the cores.
    device_turns: how many workers of a CUDA device may run their captured network at the same time, whose
        kernels compete; 0 is all of them.
    gpu_jpeg_decoding: on CUDA, decode JPEG files on the device; off decodes all in the pool of threads.
    scaled_jpeg_decoding: decode a JPEG on the CPU at 1/2, 1/4 or 1/8 of its size where both sides then have
        at least this share of the network's input; 0 decodes all in full (docs/served.md has the AP).
    jpeg_quality: of drawn images, 1..95.
    class_colours: of boxes in drawn images, "#RRGGBB" for each class in order; a shorter list begins again,
        and an empty one takes colours far apart. In YAML, # begins a comment unless the text is quoted.
    """

    variant: str = "S"
    class_names: tuple[str, ...] = ()
    input_size_hw: tuple[int, int] | None = None
    backend: str = "auto"
    precision: str = "auto"
    score_threshold: float = 0.25
    iou_threshold: float = 0.45
    max_detections: int = 300
    max_detections_limit: int = 1000
    max_candidates: int = 8192
    max_image_bytes: int = 32 * 1024 * 1024
    max_image_pixels: int = 64_000_000
    max_image_side: int = 65_535
    max_image_parts: int = 65_536
    max_jpeg_scan_pixels: int = 1_280_000_000
    max_rle_pixels: int = 4_000_000
    max_instances: int = 16
    max_instances_pixels: int = 64_000_000
    max_decode_bytes: int = 2 * 1024**3
    max_response_bytes: int = 32 * 1024 * 1024
    max_batch_seconds: float = 0.0
    image_formats: tuple[str, ...] = IMAGE_FORMATS
    decode_threads: int = 0
    compute_threads: int = 0
    warmup_batch_sizes: tuple[int, ...] = (1,)
    cuda_graphs: bool = True
    graph_batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 20, 24, 32)
    cuda_sync: str = "auto"
    device_turns: int = 2
    gpu_jpeg_decoding: bool = True
    scaled_jpeg_decoding: float = 0.0
    jpeg_quality: int = 90
    class_colours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_choice("backend", self.backend, BACKENDS)
        _require_choice("precision", self.precision, PRECISIONS)
        _require_choice("cuda_sync", self.cuda_sync, CUDA_SYNCS)
        for name in self.image_formats:
            _require_choice("image_formats", name, IMAGE_FORMATS)
        for name in ("score_threshold", "iou_threshold"):
            _require_range(name, getattr(self, name), 0.0, 1.0)
        for name in (
            "max_detections_limit",
            "max_candidates",
            "max_image_bytes",
            "max_image_pixels",
            "max_image_parts",
            "max_rle_pixels",
            "max_instances",
            "max_instances_pixels",
            "max_response_bytes",
        ):
            _require_range(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("max_jpeg_scan_pixels", "max_decode_bytes"):
            _require_range(name, getattr(self, name), 1, 2**63 - 1)
        # Beyond it, the resize kernel's 32-bit products of a side and the network's would overflow.
        _require_range("max_image_side", self.max_image_side, 1, 500_000)
        _require_range("max_detections", self.max_detections, 1, self.max_detections_limit)
        _require_range("jpeg_quality", self.jpeg_quality, 1, 95)
        for name in ("decode_threads", "compute_threads", "device_turns"):
            _require_range(name, getattr(self, name), 0, 1024)
        _require_range("max_batch_seconds", self.max_batch_seconds, 0.0, MAX_BATCH_SECONDS)
        _require_range("scaled_jpeg_decoding", self.scaled_jpeg_decoding, 0.0, 8.0)
        if not self.graph_batch_sizes:
            raise ConfigError("graph_batch_sizes is empty; set cuda_graphs to false to run without graphs")
        for name in ("warmup_batch_sizes", "graph_batch_sizes"):
            for size in getattr(self, name):
                _require_range(name, size, 1, 1024)
        if self.input_size_hw is not None and any(side < 32 or side % 32 for side in self.input_size_hw):
            raise ConfigError(
                f"input_size_hw is {list(self.input_size_hw)}; both sides must be positive multiples of 32"
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise ConfigError("class_names has a name twice; every class needs its own name")
        _require_colours(self.class_colours, self.class_names)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> ServingConfig:
        """Build from plain YAML or JSON values; lists become tuples.

        Raises:
            ConfigError: unknown key, wrong type or value out of range; names the key.
        """
        hints = get_type_hints(cls)
        unknown = sorted(set(map(str, settings)) - set(hints))
        for name in unknown:
            if name in RENAMED_SETTINGS:
                raise ConfigError(f"the setting {name} is now called {RENAMED_SETTINGS[name]}")
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(hints))}")
        return cls(**{name: _coerce(name, value, hints[name]) for name, value in settings.items()})

    def to_mapping(self) -> dict[str, Any]:
        """The settings as plain values that YAML can hold; `from_mapping` gives the same config back."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    def default_options(self) -> DetectionOptions:
        """The options of a request that sets none."""
        return DetectionOptions(self.score_threshold, self.iou_threshold, self.max_detections)


def graph_batch_sizes_up_to(largest: int) -> list[int]:
    """Batch sizes to capture for batches of at most `largest`; each takes half a second at start.

    They are densest at the batch sizes of a server under partial load: padding 12 to 16 wastes a quarter.
    """
    sizes = [1, 2, 4, 8, 12, 16, 20, 24]
    for power in range(5, largest.bit_length()):
        sizes += [2**power, 3 * 2 ** (power - 1)]
    return [*(size for size in sizes if size < largest), largest]


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of the field `name`, without guessing: "8" is not a number and 1 is not text."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) is not tuple and options:  # X | None
        return None if value is None else _coerce(name, value, options[0])
    if get_origin(hint) is tuple:
        item_hints = get_args(hint)
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} is {value!r}; a list is accepted")
        if item_hints[-1] is not Ellipsis and len(value) != len(item_hints):
            raise ConfigError(f"{name} has {len(value)} entries; {len(item_hints)} are needed")
        return tuple(_coerce(name, item, item_hints[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        unquoted = "; in YAML, text that begins with # needs quotes" if name == "class_colours" else ""
        raise ConfigError(f"{name} holds {value!r}; a value of type {hint.__name__} is needed{unquoted}")
    return value


def _require_colours(colours: tuple[str, ...], class_names: tuple[str, ...]) -> None:
    for colour in colours:
        if not re.fullmatch("#[0-9A-Fa-f]{6}", colour):
            raise ConfigError(
                f'class_colours has {colour!r}; accepted is "#RRGGBB": red, green and blue, two hexadecimal '
                "digits each"
            )
    if class_names and len(colours) > len(class_names):
        raise ConfigError(
            f"class_colours has {len(colours)} colours for {len(class_names)} classes; at most one for each "
            "class is accepted"
        )


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; accepted are {', '.join(choices)}")


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ConfigError(f"{name} is {value}; accepted is {low} to {high}")

"""Verify an archive: it is complete, and its network computes what the network as trained computes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lib.accuracy.tolerances import TOLERANCES
from lib.archive.reader import archive_environment
from lib.cli import ScriptError
from lib.paths import HANDLER_DIR

from damoyolo.checksums import SUMS_FILE
from damoyolo.config import MANIFEST_FILE, SETTINGS_FILE
from damoyolo.detector import WEIGHTS_FILE
from damoyolo.model.checkpoint import Checkpoint, load_packaged
from damoyolo.model.damoyolo import build_model
from damoyolo.model.fold import fold_state_dict

VERIFY_TIMEOUT_S = 300.0
PROGRAM = Path(__file__).with_name("verify_worker.py")
PROBE_SIZE_HW = (128, 160)
# Largest accepted difference between the folded network and the one as trained, both in PyTorch in float32,
# relative to the root mean square of an output tensor. A sum of n products has a rounding error of about
# sqrt(n) * 2**-24, and the errors of D layers add up like a random walk: with n = 2,000 and D = 100 that is
# 2.7e-5. Times sqrt(2), because both networks have it, and 5, because the largest of some 10,000 values
# counts.
FOLDED_TOLERANCE = 2e-4
# The smallest spread of the class logits over an image that still depends on the image.
CONSTANT_SPREAD = 1e-6

Outputs = dict[str, NDArray[np.float32]]


def verify_archive(archive: Path, checkpoint: Checkpoint, class_names: Sequence[str]) -> list[str]:
    """Check an archive against what it was made from; returns the names of its files.

    checkpoint: as trained. class_names: in the order of its classes.

    Raises:
        ScriptError: a file is missing, the weights are not the checkpoint's, or a fresh process cannot detect
            with the archive or predicts something else than the network as trained.
    """
    with zipfile.ZipFile(archive) as opened, tempfile.TemporaryDirectory(prefix="verify-") as name:
        names = opened.namelist()
        modules = {
            str(path.relative_to(HANDLER_DIR))
            for path in HANDLER_DIR.rglob("*")
            if path.suffix in (".py", ".html", ".css", ".js")
        }
        missing = sorted((modules | {WEIGHTS_FILE, SUMS_FILE, SETTINGS_FILE, MANIFEST_FILE}) - set(names))
        if missing:
            raise ScriptError(f"{archive} lacks {', '.join(missing)}")
        unpacked, scratch = Path(name) / "unpacked", Path(name) / "scratch"
        scratch.mkdir()
        opened.extractall(unpacked)
        _check_weights(unpacked / WEIGHTS_FILE, checkpoint)
        pixels = probe_pixels()
        found = _outputs_of_archive(archive.name, unpacked, scratch, pixels)
    if tuple(found["class_names"].tolist()) != tuple(class_names):
        raise ScriptError(
            f"{archive.name} has the classes {', '.join(found['class_names'])}; they should be "
            f"{', '.join(class_names)}"
        )
    _compare(archive.name, found, outputs_as_trained(checkpoint, pixels))
    return names


def probe_pixels() -> NDArray[np.uint8]:
    """(1, 3, H, W) uint8: noise of every scale, so that the outputs of each level differ between places."""
    height, width = PROBE_SIZE_HW
    random = np.random.default_rng(0)
    image = np.zeros((3, height, width))
    for step in (1, 2, 4, 8, 16, 32, 64):
        noise = random.standard_normal((3, -(-height // step), -(-width // step)))
        image += noise.repeat(step, 1).repeat(step, 2)[:, :height, :width]
    image = (image - image.min()) / np.ptp(image)
    pixels: NDArray[np.uint8] = np.rint(255 * image).astype(np.uint8)
    return pixels[None]


@torch.inference_mode()
def outputs_as_trained(checkpoint: Checkpoint, pixels: NDArray[np.uint8]) -> Outputs:
    """What the network as trained predicts in float32, by the names that verify_worker.py uses.

    Raises:
        ScriptError: the same whatever the image shows.
    """
    with torch.device("meta"):
        model = build_model(checkpoint.variant, checkpoint.num_classes, folded=False)
    model.load_state_dict(dict(checkpoint.state_dict), assign=True)
    raw = model.eval()(torch.from_numpy(pixels).float())
    outputs = {
        f"{kind}_{level}": tensor.numpy()
        for kind, levels in raw._asdict().items()
        for level, tensor in enumerate(levels)
    }
    spread = max(float(values.std((2, 3)).max()) for name, values in outputs.items() if "class" in name)
    if not spread > CONSTANT_SPREAD:
        raise ScriptError(
            "the weights predict the same at every place of an image whatever it shows; they are untrained "
            "or damaged"
        )
    return outputs


def _check_weights(packaged: Path, checkpoint: Checkpoint) -> None:
    """Every packaged tensor is the folded one of the checkpoint, bit by bit."""
    expected = fold_state_dict(checkpoint.state_dict)
    model = load_packaged(packaged)
    if (model.variant.name, model.num_classes) != (checkpoint.variant.name, checkpoint.num_classes):
        raise ScriptError(
            f"{packaged.name} was packed as {model.variant.name} with {model.num_classes} classes; the "
            f"weights are {checkpoint.variant.name} with {checkpoint.num_classes}"
        )
    found = model.state_dict()
    differing = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    if differing:
        raise ScriptError(
            f"{packaged.name} was packed with other values than the folded weights in {len(differing)} of "
            f"{len(expected)} tensors, the first of them {differing[0]}"
        )


def _outputs_of_archive(
    name: str, unpacked: Path, scratch: Path, pixels: NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    """What a fresh process that runs the modules of the unpacked archive writes (verify_worker.py)."""
    given, written = scratch / "pixels.npy", scratch / "outputs.npz"
    np.save(given, pixels)
    check = subprocess.run(
        [sys.executable, "-c", PROGRAM.read_text(), str(given), str(written)],
        cwd=unpacked,
        env=archive_environment(unpacked, PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=VERIFY_TIMEOUT_S,
    )
    if check.returncode != 0:
        raise ScriptError(f"{name} was packed but does not work:\n{check.stderr}")
    with np.load(written) as outputs:
        return dict(outputs)


def _compare(name: str, found: dict[str, NDArray[Any]], expected: Outputs) -> None:
    precision, tolerances = str(found["precision"]), {"plain": FOLDED_TOLERANCE, "served": FOLDED_TOLERANCE}
    if found["backend"] != "pytorch":  # computes in another order, or with quantised weights
        tolerances["served"] = TOLERANCES[precision].logit_noise
    for network, tolerance in tolerances.items():
        for output, values in expected.items():
            computed = found[f"{network}_{output}"]
            if computed.shape != values.shape:
                raise ScriptError(f"{name} predicts {output} as {computed.shape} instead of {values.shape}")
            difference, scale = computed - values, np.sqrt(np.mean(values**2))
            # A quantised network is judged by its mean error: single values are far off.
            error = np.sqrt(np.mean(difference**2)) if precision == "int8" else np.abs(difference).max()
            if not error <= tolerance * scale:  # NaN fails, too
                raise ScriptError(
                    f"{name} was packed, but its network ({network}) does not compute what the weights as "
                    f"trained do: {output} is off by {error / scale:.2g} of its size, accepted is "
                    f"{tolerance:g}"
                )

"""Build the archives that the table of backends measures."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.cli import ScriptError
from lib.measure.backend_rows import BackendRow
from lib.packaging.builder import ArchiveRequest, build_archive
from lib.packaging.weights import fetch_weights, folded_network
from lib.paths import PROJECT_DIR

from damoyolo.backends.onnx_metadata import weights_digest
from damoyolo.model.checkpoint import load_checkpoint

BUILD_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Model:
    """Weights to measure, and the INT8 file made from them, if there is one."""

    weights: Path
    variant: str
    class_names: tuple[str, ...]
    int8_file: Path | None = None


def read_models(
    weights: Sequence[str], class_names: tuple[str, ...], int8_files: Sequence[Path]
) -> list[Model]:
    """The weights with their variants; each INT8 file is assigned to the weights it was made from.

    Raises:
        ScriptError: two of one variant, or a file that belongs to none of the weights.
        DamoYoloError: a file cannot be read.
    """
    models: dict[str, Model] = {}
    for source in weights:
        path = fetch_weights(source)
        variant = load_checkpoint(path, num_classes=len(class_names)).variant.name
        if variant in models:
            raise ScriptError(
                f"{models[variant].weights} and {path} are both of variant {variant}; accepted is one of each"
            )
        models[variant] = Model(path, variant, class_names)
    for file in int8_files:
        from lib.onnx.export import read_onnx_metadata  # without INT8 files, onnx is not needed

        facts = read_onnx_metadata(file)
        model = models.get(facts.variant)
        if model is None or facts.weights_digest != weights_digest(
            folded_network(model.weights, model.variant, len(class_names))
        ):
            raise ScriptError(
                f"{file} was made from weights of variant {facts.variant} that are not among --weights"
            )
        if facts.precision != "int8":
            raise ScriptError(f"{file} has precision {facts.precision}; accepted are int8 files")
        if model.int8_file is not None:
            raise ScriptError(f"{model.int8_file} and {file} are both INT8 files of variant {facts.variant}")
        models[facts.variant] = dataclasses.replace(model, int8_file=file)
    return list(models.values())


def build_row_archive(
    model: Model, row: BackendRow, folder: Path, max_batch_size: int, voc: Path | None
) -> Path:
    """The archive of a row, in `folder`.

    max_batch_size: the largest that will be measured. voc: data set for the proof of a TensorRT engine.

    Raises:
        ScriptError, DamoYoloError: it cannot be built, or the engine is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if row.backend == "tensorrt":
        return _build_tensorrt(model, row, folder, voc)
    request = ArchiveRequest(
        weights=str(model.weights),
        variant=model.variant,
        class_names=model.class_names,
        onnx=model.int8_file if row.quantised else None,
        output_dir=folder,
        model_settings={"batchSize": max_batch_size},  # CUDA graphs are captured up to this size
        serving={"backend": row.backend, "precision": row.precision},
    )
    return build_archive(request).path


def _build_tensorrt(model: Model, row: BackendRow, folder: Path, voc: Path | None) -> Path:
    """Run scripts/build_tensorrt.py, which compares the engine with PyTorch before there is an archive."""
    from lib.onnx.export import export_onnx

    command = [sys.executable, str(PROJECT_DIR / "scripts" / "build_tensorrt.py")]
    command += ["--weights", str(model.weights), "--output-dir", str(folder)]
    if row.quantised:
        command += ["--onnx", str(model.int8_file)]
    else:
        network = folded_network(model.weights, model.variant, len(model.class_names))
        export_onnx(network, folder / "network.onnx", class_names=model.class_names)
        command += ["--onnx", str(folder / "network.onnx"), "--precision", row.precision]
    if voc is not None:
        command += ["--voc", str(voc)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    path = folder / "damoyolo.mar"
    if built.returncode != 0 or not path.is_file():
        raise ScriptError(built.stderr or f"build_tensorrt.py wrote no {path}")
    return path

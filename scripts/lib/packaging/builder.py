"""Build an archive from weights, handler and settings, and verify it before it replaces an existing one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive

from lib.archive.members import queue_size
from lib.cli import ScriptError
from lib.packaging.class_names import check_class_names, default_class_names
from lib.packaging.verify import verify_archive
from lib.packaging.weights import fetch_weights, load_source
from lib.paths import DEMO_WEIGHTS, HANDLER_DIR, MODEL_STORE, SAMPLE_IMAGES

from damoyolo.backends import ONNX_FILE
from damoyolo.backends.onnx_metadata import check_compatible
from damoyolo.checksums import SUMS_FILE, sums_of
from damoyolo.config import MANIFEST_FILE, SETTINGS_FILE, ServingConfig, graph_batch_sizes_up_to
from damoyolo.detector import WEIGHTS_FILE
from damoyolo.model.checkpoint import Checkpoint, load_packaged, save_packaged


@dataclass(frozen=True)
class ArchiveRequest:
    """What to build.

    weights: file, https address or name of an official checkpoint. sha256: expected digest of that file.
    variant: name of the variant; None takes the one that the weights fit.
    class_names: one for each class; None takes the demo's for the demo weights, else COCO's 80.
    unused_class: the last class channel of the weights is the unused one of older heads, and has no name.
    onnx: file of scripts/export_onnx.py or scripts/quantize.py to pack beside the weights, for the backends
        that run such files. None exports one where the backend needs it.
    model_settings: keys of model-config.yaml outside `handler:`; they take precedence over the project's.
    serving: keys of `handler:` (damoyolo.config.ServingConfig); they take precedence over the defaults.
    backend_files: further files that the backend needs, packed under their own names.
    """

    weights: str = str(DEMO_WEIGHTS)
    sha256: str | None = None
    variant: str | None = None
    class_names: tuple[str, ...] | None = None
    unused_class: bool = False
    model_name: str = "damoyolo"
    version: str = "1.0"
    onnx: Path | None = None
    output_dir: Path = MODEL_STORE
    model_settings: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)
    backend_files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ArchiveReport:
    """What was built; `digest` is equal for archives of equal content."""

    path: Path
    digest: str
    variant: str
    num_classes: int
    files: int


def build_archive(request: ArchiveRequest) -> ArchiveReport:
    """Build, open again and verify an archive.

    Raises:
        ScriptError, DamoYoloError: with what has to change.
    """
    for option, text in (("--model", request.model_name), ("--version", request.version)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{,99}", text):
            raise ScriptError(
                f"{option} is {text!r}; accepted are up to 100 letters, digits, points, - and _, "
                "the first of them a letter or digit"
            )
    weights = fetch_weights(request.weights, request.sha256)
    given = request.class_names
    class_names = check_class_names(default_class_names(weights) if given is None else given)
    checkpoint = load_source(weights, request.variant, len(class_names), request.unused_class)
    settings = _settings_of(request, checkpoint, class_names)
    config = ServingConfig.from_mapping(settings["handler"])  # refuse here what the worker would refuse
    if config.backend == "tensorrt" and not request.backend_files:
        raise ScriptError(
            "backend is tensorrt, whose engine has to be built and compared on the GPU that serves: "
            "scripts/build_tensorrt.py builds it and the archive"
        )

    request.output_dir.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished archive moves into place in one step.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=request.output_dir) as name:
        private = Path(name)
        save_packaged(private / WEIGHTS_FILE, checkpoint)
        (private / SETTINGS_FILE).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        if request.onnx is not None or config.backend == "onnxruntime":
            _add_onnx(request.onnx, private, config)
        data_files = [private / WEIGHTS_FILE, *private.glob(ONNX_FILE), *request.backend_files]
        (private / SUMS_FILE).write_text(sums_of(data_files))
        built = _run_archiver(request, private)
        digest = content_digest(built)
        names = verify_archive(built, checkpoint, class_names)
        path = request.output_dir / built.name
        built.replace(path)
    return ArchiveReport(path, digest, checkpoint.variant.name, checkpoint.num_classes, len(names))


def _settings_of(
    request: ArchiveRequest, checkpoint: Checkpoint, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """The content of the archive's model-config.yaml."""
    settings: dict[str, Any] = yaml.safe_load((HANDLER_DIR / SETTINGS_FILE).read_text())
    settings.update(request.model_settings)
    if "jobQueueSize" not in request.model_settings:
        needed = queue_size(settings["batchSize"], settings["minWorkers"])
        settings["jobQueueSize"] = max(settings["jobQueueSize"], needed)
    settings["handler"] = {
        "graph_batch_sizes": graph_batch_sizes_up_to(settings["batchSize"]),
        **(settings["handler"] or {}),
        "variant": checkpoint.variant.name,
        "class_names": list(class_names),
        **request.serving,
    }
    return settings


def _add_onnx(source: Path | None, private: Path, config: ServingConfig) -> None:
    """Write ONNX_FILE into the folder `private`: a copy of `source`, or an export of the weights there."""
    try:
        from lib.onnx.check import check_onnx, sample_batches
        from lib.onnx.export import export_onnx, read_onnx_metadata
    except ImportError as error:
        raise ScriptError(
            f"ONNX files need packages that are missing ({error}): pip install onnx onnxscript onnxruntime"
        ) from error
    model, target = load_packaged(private / WEIGHTS_FILE), private / ONNX_FILE
    if source is not None:
        check_compatible(read_onnx_metadata(source), source, config, model)
        shutil.copyfile(source, target)
        return
    export_onnx(model, target, class_names=config.class_names)
    check_onnx(target, model, sample_batches(model, SAMPLE_IMAGES))


def _run_archiver(request: ArchiveRequest, private: Path) -> Path:
    """Pack the archive into a folder of its own below `private`."""
    export_dir, scratch_dir = private / "export", private / "scratch"
    export_dir.mkdir()
    scratch_dir.mkdir()
    extra_files = (HANDLER_DIR, private / SUMS_FILE, *private.glob(ONNX_FILE), *request.backend_files)
    config = ModelArchiverConfig(
        model_name=request.model_name,
        version=request.version,
        handler=str(HANDLER_DIR / "damoyolo_handler.py"),
        serialized_file=str(private / WEIGHTS_FILE),
        extra_files=",".join(map(str, extra_files)),
        config_file=str(private / SETTINGS_FILE),
        export_path=str(export_dir),
        # Weights hardly compress, and the server would unpack them at each start.
        archive_format="zip-store",
        force=True,
    )
    # The archiver empties $TMPDIR/<model name>, which another run may be using.
    before, tempfile.tempdir = tempfile.tempdir, str(scratch_dir)
    try:
        generate_model_archive(config)
    finally:
        tempfile.tempdir = before
    return export_dir / f"{request.model_name}.mar"


def content_digest(archive: Path) -> str:
    """SHA-256 over names and contents, in hexadecimal; does not depend on time and order of packing."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            content = opened.read(name)
            if name == MANIFEST_FILE:
                manifest = json.loads(content)
                del manifest["createdOn"]
                content = json.dumps(manifest, sort_keys=True).encode()
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()

"""Build a model repository of Triton from an archive of this project.

python deploy/triton/build_repository.py --archive model_store/damoyolo.mar --output-dir output/triton

The model gets the archive's name, version 1, and its batch size, delay, workers and length of queue.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from lib.cli import ScriptError, command_parser, positive_int, run_command
from lib.paths import DEMO_ARCHIVE

MODEL_FILE = Path(__file__).with_name("model.py")
INSTANCE_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}
VERSION = "1"

# Dimensions without the first one, which Triton adds: images for `answer` and `counts`, else detections.
CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {setting.batch_size}
input [ {{ name: "image" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [
  {{ name: "answer" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "counts" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "boxes" data_type: TYPE_FP32 dims: [ 4 ] }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "class_ids" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "labels" data_type: TYPE_STRING dims: [ 1 ] }}
]
dynamic_batching {{
  preferred_batch_size: [ {setting.batch_size} ]
  max_queue_delay_microseconds: {delay_us}
  default_queue_policy {{ max_queue_size: {queue_size} }}
}}
instance_group [ {{ kind: {kind} count: {setting.workers} }} ]
"""


def build_repository(
    archive: Path,
    folder: Path,
    device: str = "auto",
    batch_size: int | None = None,
    delay_ms: int | None = None,
    workers: int | None = None,
) -> str:
    """Write the repository into `folder`, in place of a model of the same name; returns the model's name.

    device: one of INSTANCE_KINDS. batch_size, delay_ms, workers: in place of the archive's; on CUDA `workers`
    is for each GPU.

    Raises:
        ScriptError: the archive cannot be read, or the folder of the model holds something else.
    """
    from lib.archive.members import (
        archive_with_setting,
        batching_of,
        opened_archive,
        read_manifest,
        read_settings,
        setting_with,
        settings_to_open,
    )

    settings = settings_to_open(archive)
    name = read_manifest(archive)["model"]["modelName"]
    own = batching_of(settings)
    setting = setting_with(own, batch_size, delay_ms, workers)
    model = folder / name
    if model.exists() and not (model / VERSION / "archive").is_dir():
        raise ScriptError(f"{model} exists and is no model of this command; name another --output-dir")
    shutil.rmtree(model, ignore_errors=True)
    version = model / VERSION
    version.mkdir(parents=True)
    if setting != own:  # the graphs of the network are for certain batch sizes
        archive = archive_with_setting(archive, version, setting)
        settings = read_settings(archive)
    with opened_archive(archive) as opened:
        opened.extractall(version / "archive")
    if archive.parent == version:
        archive.unlink()
    shutil.copy(MODEL_FILE, version)
    (model / "config.pbtxt").write_text(
        CONFIG.format(
            name=name,
            setting=setting,
            delay_us=1000 * setting.delay_ms,
            queue_size=settings["jobQueueSize"],
            kind=INSTANCE_KINDS[device],
        )
    )
    return str(name)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of `build_repository`, which serve.py has, too."""
    add = parser.add_argument
    add("--archive", type=Path, default=DEMO_ARCHIVE, metavar="FILE", help="the .mar file")
    add("--device", choices=INSTANCE_KINDS, default="auto", help="auto: the GPUs that Triton finds, else CPU")
    add("--workers", type=positive_int, metavar="N", help="processes (of each GPU); default: the archive's")
    add("--batch-size", type=positive_int, metavar="N", help="largest batch; default: the archive's")
    add("--max-batch-delay", type=positive_int, metavar="MS", help="default: the archive's")


def build_from(arguments: argparse.Namespace, folder: Path) -> str:
    """`build_repository` with the options of the command line."""
    return build_repository(
        arguments.archive,
        folder,
        arguments.device,
        arguments.batch_size,
        arguments.max_batch_delay,
        arguments.workers,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Build, and say where it is."""
    parser = command_parser(__doc__)
    add_model_options(parser)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the repository")

    def run(arguments: argparse.Namespace) -> None:
        name = build_from(arguments, arguments.output_dir)
        print(f"{arguments.output_dir / name}: start Triton with --model-repository={arguments.output_dir}")

    return run_command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

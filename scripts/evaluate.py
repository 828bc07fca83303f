"""Measure the accuracy (COCO metrics) and throughput of a running server or of a detector in this process.

python scripts/evaluate.py --coco tests/data/smears/annotations.json        a running server
python scripts/evaluate.py --voc DIR --split test --results detections.json
python scripts/evaluate.py --coco instances.json --images DIR --archive model_store/damoyolo.mar

--results writes the detections as a COCO results file, with the image and category ids of the data set. One
in Pascal VOC format has none: images are numbered in the order of the split, and NAME.images.json lists the
numbers.

Prints AP, AP50 and AP75 of all classes together and of each, and the images per second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.accuracy.datasets import DetectionDataset, read_dataset
from lib.cli import (
    DEFAULT_MODEL,
    DEFAULT_URL,
    ScriptError,
    add_client,
    command_parser,
    fraction,
    name_list,
    open_client,
    positive_int,
    printable,
    run_command,
)

if TYPE_CHECKING:
    from lib.accuracy.coco_metrics import CocoMetrics, CocoPrediction
    from lib.accuracy.predictors import Predictor

Row = dict[str, Any]


def package_weights(
    weights: str, variant: str | None, class_names: tuple[str, ...] | None, output_dir: Path
) -> Path:
    """An archive of the project's handler with `weights`, given as for build_archive.py.

    Raises:
        ScriptError, DamoYoloError: the weights cannot be read or do not fit.
    """
    from lib.packaging.builder import ArchiveRequest, build_archive

    request = ArchiveRequest(weights=weights, variant=variant, class_names=class_names, output_dir=output_dir)
    return build_archive(request).path


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the arguments say."""
    parser = _parser()

    def run(arguments: argparse.Namespace) -> None:
        _check(parser, arguments)
        _run(arguments)

    return run_command(run, parser, argv)


def _run(arguments: argparse.Namespace) -> None:
    from lib.accuracy.coco_metrics import compute_metrics
    from lib.accuracy.predictors import gather_predictions

    dataset = read_dataset(arguments.voc, arguments.split, arguments.coco, arguments.images)
    assert dataset is not None  # _check requires one
    if not dataset.images:
        raise ScriptError(f"the data set {dataset.name} has no images")
    print(
        f"{printable(dataset.name)}: {len(dataset.images)} images, {dataset.object_count} objects of "
        f"{len(dataset.class_names)} classes; {dataset.dropped_objects} objects under 2 px dropped"
    )
    with ExitStack() as stack:
        open_source = _open_detector if _is_in_process(arguments) else _open_server
        predictor, source = open_source(arguments, dataset, stack)
        predictions, spent_s = gather_predictions(dataset, predictor, arguments.progress)
    if arguments.results is not None:  # before anything that could fail
        _write_results(arguments, dataset, predictions)
    metrics = compute_metrics(dataset, predictions)
    row = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data_set": dataset.name,
        "images": len(dataset.images),
        "objects": dataset.object_count,
        "dropped_objects": dataset.dropped_objects,
        **source,
        "note": arguments.note,
        "score_threshold": arguments.score_threshold,
        "iou_threshold": arguments.iou_threshold,
        "max_detections": arguments.max_detections,
        "classes": arguments.classes,
        "predictions": len(predictions),
        "seconds": round(spent_s, 3),
        "images_per_s": round(len(dataset.images) / spent_s, 2),
        **metrics.overall._asdict(),
        "per_class": {name: ap._asdict() for name, ap in metrics.per_class.items()},
    }
    _print_report(dataset, metrics, row)
    _write_files(arguments, dataset, metrics, row)


def _open_detector(
    arguments: argparse.Namespace, dataset: DetectionDataset, stack: ExitStack
) -> tuple[Predictor, Row]:
    """A predictor of the detector in this process, and what the record says about it."""
    import platform

    import torch

    from lib.accuracy.predictors import detector_predictor, match_labels
    from lib.archive.reader import load_detector
    from lib.devices import open_device

    from damoyolo.errors import DamoYoloError
    from damoyolo.structures import DetectionOptions

    archive = arguments.archive
    if archive is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        archive = package_weights(arguments.weights, arguments.variant, arguments.class_names, folder)
    device = open_device(arguments.device)
    chosen = {"precision": arguments.precision, "backend": arguments.backend}
    try:
        detector = load_detector(
            archive, device, **{name: value for name, value in chosen.items() if value is not None}
        )
    except (DamoYoloError, OSError) as error:
        raise ScriptError(
            f"cannot load the detector of {archive}: {error}; scripts/build_archive.py builds an archive"
        ) from error
    class_names = dict(enumerate(detector.config.class_names))
    match_labels(class_names, dataset.class_names.values())
    options = DetectionOptions(
        arguments.score_threshold,
        arguments.iou_threshold,
        arguments.max_detections,
        None if arguments.classes is None else tuple(match_labels(class_names, arguments.classes).values()),
    )
    batch_size = arguments.batch_size or 8
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return detector_predictor(detector, options, batch_size), {
        "archive": None if arguments.archive is None else str(arguments.archive),
        "weights": arguments.weights,
        "variant": arguments.variant,
        "batch_size": batch_size,
        "device": f"{device} ({hardware})",
        "backend": detector.pipeline.name,
        "precision": detector.pipeline.precision,
    }


def _open_server(
    arguments: argparse.Namespace, _dataset: DetectionDataset, stack: ExitStack
) -> tuple[Predictor, Row]:
    """A predictor of the running server, and what the record says about it."""
    from lib.accuracy.predictors import server_predictor

    from damoyolo_client.client import RequestOptions

    client = stack.enter_context(open_client(arguments))
    client.require_server()

    def report_repeated() -> None:
        if client.repeated:
            print(
                f"evaluate: {client.repeated} requests were sent again; the time includes it", file=sys.stderr
            )

    stack.callback(report_repeated)
    options = RequestOptions(
        arguments.score_threshold, arguments.iou_threshold, arguments.max_detections, arguments.classes
    )
    in_flight = arguments.in_flight or 8
    unknown = dict.fromkeys(("device", "backend", "precision"))
    record = {"url": arguments.url, "model": arguments.model, "in_flight": in_flight, **unknown}
    return server_predictor(client, options, in_flight), record


def _write_results(
    arguments: argparse.Namespace, dataset: DetectionDataset, predictions: Sequence[CocoPrediction]
) -> None:
    from damoyolo_client.coco import write_index, write_results

    write_results(arguments.results, predictions)
    print(f"results: {arguments.results}")
    if arguments.coco is None:
        images = [{"id": image.image_id, "file_name": image.path.name} for image in dataset.images]
        index = write_index(arguments.results, images, dataset.class_names)
        print(f"what their ids mean: {index}")


def _print_report(dataset: DetectionDataset, metrics: CocoMetrics, row: Mapping[str, Any]) -> None:
    rows = [("all classes", metrics.overall)]
    rows += [(printable(name), ap) for name, ap in metrics.per_class.items()]
    width = max(len(name) for name, _ in rows)
    print(f"{'':{width}}  {'AP':>6}  {'AP50':>6}  {'AP75':>6}")
    for name, ap in rows:
        print(f"{name:{width}}  {ap.ap:6.4f}  {ap.ap50:6.4f}  {ap.ap75:6.4f}")
    print(
        f"{row['predictions']} detections in {row['seconds']:.1f} s, "
        f"{row['images_per_s']:.1f} images per second"
    )


def _write_files(
    arguments: argparse.Namespace, dataset: DetectionDataset, metrics: CocoMetrics, row: Row
) -> None:
    from lib.accuracy.coco_metrics import plot_precision_recall
    from lib.measure.environment import environment
    from lib.measure.timing import append_json_rows

    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_precision_recall(metrics, dataset.name, arguments.plot)
        print(f"precision-recall plot: {arguments.plot}")
    if arguments.jsonl is not None:
        append_json_rows(arguments.jsonl, [row], {"versions": environment()})
        print(f"row added to {arguments.jsonl}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, {"--pictures": "--images", "--json": "--jsonl"})
    _add_data_arguments(parser)
    _add_detector_arguments(parser)
    _add_output_arguments(parser)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data set (--voc or --coco)")
    dataset = data.add_mutually_exclusive_group(required=True)
    dataset.add_argument("--voc", type=Path, metavar="DIR", help="data set in Pascal VOC format")
    data.add_argument("--split", default="test", help="list in ImageSets/Main to use (%(default)s)")
    dataset.add_argument(
        "--coco", type=Path, metavar="FILE", help="instances file of a data set in COCO format"
    )
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of --coco (its own)")


def _add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("running server")
    add_client(server)
    server.add_argument("--in-flight", type=positive_int, metavar="N", help="concurrent requests (8)")

    detector = parser.add_argument_group("in-process detector, instead of a server")
    source = detector.add_mutually_exclusive_group()
    source.add_argument("--archive", type=Path, metavar="MAR", help="file, or unpacked folder")
    source.add_argument("--weights", help="weights to package for this run, as for build_archive.py")
    detector.add_argument("--variant", help="variant of --weights (found from the weights)")
    detector.add_argument("--class-names", type=name_list, metavar="A,B", help="of --weights, in class order")
    detector.add_argument("--batch-size", type=positive_int, metavar="N", help="(8)")
    detector.add_argument("--device", help="cpu or cuda[:index] (a GPU if there is one)")
    detector.add_argument("--precision", help="in place of the archive's")
    detector.add_argument("--backend", help="in place of the archive's")

    request = parser.add_argument_group("detection")
    request.add_argument(
        "--score-threshold", type=fraction, default=0.05, metavar="0..1", help="(%(default)s)"
    )
    request.add_argument(
        "--iou-threshold", type=fraction, default=0.7, metavar="0..1", help="of NMS (%(default)s)"
    )
    request.add_argument(
        "--max-detections", type=positive_int, default=500, metavar="N", help="(%(default)s)"
    )
    request.add_argument("--classes", type=name_list, metavar="A,B", help="detect only these classes (all)")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--results", type=Path, metavar="FILE", help="write a COCO results file")
    output.add_argument("--plot", type=Path, metavar="FILE", help="plot precision against recall")
    output.add_argument(
        "--jsonl", type=Path, metavar="FILE", help="append a line with all figures, settings and versions"
    )
    output.add_argument("--note", help="text for the row, for example how the server was started")
    output.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar on stderr (if that is a terminal)",
    )


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other or would have no effect."""
    if arguments.coco is None and arguments.images is not None:
        parser.error("--images is the folder of the images of --coco")
    if arguments.weights is None and (arguments.variant is not None or arguments.class_names is not None):
        parser.error("--variant and --class-names are for --weights; an archive has its own")
    if not _is_in_process(arguments):
        for name in ("batch_size", "device", "precision", "backend"):
            if getattr(arguments, name) is not None:
                parser.error(
                    f"--{name.replace('_', '-')} is for --archive and --weights; a server has its own "
                    "(model-config.yaml)"
                )
    elif (arguments.url, arguments.model, arguments.in_flight, arguments.ca_file) != (
        DEFAULT_URL,
        DEFAULT_MODEL,
        None,
        None,
    ):
        parser.error(
            "--url, --model, --in-flight and --ca-file are for a server; --archive and --weights evaluate in "
            "this process"
        )


def _is_in_process(arguments: argparse.Namespace) -> bool:
    return arguments.archive is not None or arguments.weights is not None


if __name__ == "__main__":
    sys.exit(main())

"""Measure the accuracy (COCO metrics) and the throughput of a running server or of the in-process detector.

python scripts/evaluate.py --voc DIR --split test
python scripts/evaluate.py --coco instances.json --images DIR --archive model_store/damoyolo.mar
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.accuracy.coco_metrics import (
    CocoMetrics,
    MetricsError,
    compute_metrics,
    plot_precision_recall,
)
from lib.accuracy.datasets import DatasetError, DetectionDataset, read_coco, read_voc
from lib.accuracy.predictors import (
    EvaluationError,
    gather_predictions,
    in_process_predictor,
    match_labels,
    server_predictor,
)
from lib.cli import ScriptError, fraction, name_list, positive_int, positive_seconds
from lib.measure.environment import installed_versions
from lib.server import DEFAULT_URL
from lib.server.client import DetectionClient, RequestOptions

if TYPE_CHECKING:
    pass


def package_weights(
    weights: str, variant: str | None, class_names: tuple[str, ...] | None, output_dir: Path
) -> Path:
    """An archive of the project's handler with `weights`, which are whatever build_archive.py takes.

    Raises:
        EvaluationError: the weights cannot be had, or do not fit.
    """
    from lib.cli import ScriptError
    from lib.packaging.builder import ArchiveRequest, build_archive

    from damoyolo.errors import DamoYoloError

    request = ArchiveRequest(weights=weights, variant=variant, class_names=class_names, output_dir=output_dir)
    try:
        return build_archive(request).path
    except (ScriptError, DamoYoloError) as error:
        raise EvaluationError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the arguments say; 0 when there is a result, 1 when there is none."""
    parser = _argument_parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    try:
        _evaluate(arguments)
    except (EvaluationError, DatasetError, MetricsError, ScriptError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.voc is not None:
        dataset = read_voc(arguments.voc, arguments.split)
    else:
        dataset = read_coco(arguments.coco, arguments.images)
    if not dataset.images:
        raise EvaluationError(f"the data set {dataset.name} has no images")
    print(
        f"{dataset.name}: {len(dataset.images)} images, {dataset.object_count} objects of "
        f"{len(dataset.class_names)} classes; {dataset.dropped_objects} objects under 2 px dropped"
    )
    options = RequestOptions(
        arguments.score_threshold, arguments.iou_threshold, arguments.max_detections, arguments.classes
    )
    with ExitStack() as stack:
        if _is_in_process(arguments):
            archive = arguments.archive
            if archive is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                archive = package_weights(arguments.weights, arguments.variant, arguments.class_names, folder)
            batch_size = arguments.batch_size or 8
            predictor, names, record = in_process_predictor(
                archive, options, batch_size, arguments.device, arguments.precision, arguments.backend
            )
            match_labels(dict(enumerate(names)), dataset.class_names.values())
            source = {
                "archive": None if arguments.archive is None else str(arguments.archive),
                "weights": arguments.weights,
                "variant": arguments.variant,
                "batch_size": batch_size,
                **record,
            }
        else:
            client = stack.enter_context(DetectionClient(arguments.url, arguments.timeout))
            client.require_server()
            in_flight = arguments.in_flight or 8
            predictor = server_predictor(client, options, in_flight)
            source = {
                "url": arguments.url,
                "in_flight": in_flight,
                "device": None,
                "backend": None,
                "precision": None,
            }
        predictions, seconds = gather_predictions(dataset, predictor, arguments.progress)
    metrics = compute_metrics(dataset, predictions)
    row = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data_set": dataset.name,
        "images": len(dataset.images),
        "objects": dataset.object_count,
        "dropped_objects": dataset.dropped_objects,
        **source,
        "note": arguments.note,
        "score_threshold": options.score_threshold,
        "iou_threshold": options.iou_threshold,
        "max_detections": options.max_detections,
        "classes": options.classes,
        "predictions": len(predictions),
        "seconds": round(seconds, 3),
        "images_per_s": round(len(dataset.images) / seconds, 2),
        **metrics.overall._asdict(),
        "per_class": {name: ap._asdict() for name, ap in metrics.per_class.items()},
        "versions": installed_versions(),
    }
    _report(dataset, metrics, row)
    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_precision_recall(metrics, dataset.name, arguments.plot)
        print(f"precision-recall plot: {arguments.plot}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(f"row added to {arguments.json}")


def _report(dataset: DetectionDataset, metrics: CocoMetrics, row: Mapping[str, Any]) -> None:
    width = max(len("all classes"), *map(len, dataset.class_names.values()))
    print(f"{'':{width}}  {'AP':>6}  {'AP50':>6}  {'AP75':>6}")
    for name, ap in (("all classes", metrics.overall), *metrics.per_class.items()):
        print(f"{name:{width}}  {ap.ap:6.4f}  {ap.ap50:6.4f}  {ap.ap75:6.4f}")
    print(
        f"{row['predictions']} detections in {row['seconds']:.1f} s, "
        f"{row['images_per_s']:.1f} images per second"
    )


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    data = parser.add_argument_group("data set (--voc, or --coco with --images)")
    data.add_argument("--voc", type=Path, metavar="DIR", help="data set in Pascal-VOC form")
    data.add_argument("--split", default="test", help="list of ImageSets/Main to take (%(default)s)")
    data.add_argument("--coco", type=Path, metavar="FILE", help="instances file of a data set in COCO form")
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of --coco")

    server = parser.add_argument_group("running server")
    server.add_argument("--url", default=DEFAULT_URL, help="address of the model's predictions (%(default)s)")
    server.add_argument("--in-flight", type=positive_int, metavar="N", help="requests at a time (8)")
    server.add_argument(
        "--timeout",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="longest wait for an answer (%(default)s)",
    )

    detector = parser.add_argument_group("in-process detector, instead of a server")
    detector.add_argument(
        "--archive", type=Path, metavar="MAR", help="archive file, or folder of an unpacked one"
    )
    detector.add_argument("--weights", help="weights to package for this run, as build_archive.py takes them")
    detector.add_argument("--variant", help="variant of --weights (the one that they fit)")
    detector.add_argument(
        "--class-names", type=name_list, metavar="A,B", help="of --weights, in the order of their classes"
    )
    detector.add_argument("--batch-size", type=positive_int, metavar="N", help="images at a time (8)")
    detector.add_argument("--device", help="cpu or cuda[:index] (a GPU where there is one)")
    detector.add_argument("--precision", help="in place of the archive's")
    detector.add_argument("--backend", help="backend, in place of the archive's")

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
    request.add_argument("--classes", type=name_list, metavar="A,B", help="look for these classes only (all)")

    output = parser.add_argument_group("output")
    output.add_argument("--plot", type=Path, metavar="PNG", help="write a precision-recall plot")
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="append a row with all figures, settings, versions"
    )
    output.add_argument("--note", help="text for the row, say how the server was started")
    output.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar on stderr (when that is a terminal)",
    )
    return parser


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other, or that would be without effect."""
    if (arguments.voc is None) == (arguments.coco is None):
        parser.error("give one data set: --voc DIR, or --coco FILE with --images DIR")
    if (arguments.coco is None) != (arguments.images is None):
        parser.error("--coco and --images belong together")
    if arguments.archive is not None and arguments.weights is not None:
        parser.error("give one of --archive and --weights")
    if arguments.weights is None and (arguments.variant is not None or arguments.class_names is not None):
        parser.error("--variant and --class-names are for --weights; an archive has its own")
    if not _is_in_process(arguments):
        for name in ("batch_size", "device", "precision", "backend"):
            if getattr(arguments, name) is not None:
                parser.error(
                    f"--{name.replace('_', '-')} is for --archive and --weights; a server has its own "
                    "(model-config.yaml)"
                )
    elif arguments.in_flight is not None or arguments.url != DEFAULT_URL:
        parser.error(
            "--url and --in-flight are for a server; --archive and --weights evaluate in this process"
        )


def _is_in_process(arguments: argparse.Namespace) -> bool:
    return arguments.archive is not None or arguments.weights is not None


if __name__ == "__main__":
    sys.exit(main())

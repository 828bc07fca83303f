"""Send images to a running server; print the detections, write JSON lines and drawn images.

python scripts/detect.py image.jpg
python scripts/detect.py folder --recursive --jsonl detections.jsonl --draw output
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lib.cli import (
    command_parser,
    fraction,
    name_list,
    positive_int,
    positive_seconds,
    printable,
    run_command,
    seconds,
)
from lib.server import DEFAULT_RETRY_S, DEFAULT_URL

if TYPE_CHECKING:
    from lib.server.client import DetectionClient, Outcome


def drawn_names(images: Sequence[Path]) -> list[str]:
    """A file name for the drawn form of each image; no two are equal, none equals an image's own."""
    taken = {image.name for image in images}
    names = []
    for image in images:
        name, count = f"{image.stem}_detections.jpg", 1
        while name in taken:
            count += 1
            name = f"{image.stem}_detections_{count}.jpg"
        taken.add(name)
        names.append(name)
    return names


def table_lines(image: str, answer: Mapping[str, Any], image_width: int) -> list[str]:
    """A line for each detection of an answer, or one that says that there is none."""
    lines = [
        f"{image:{image_width}}  {printable(found['label']):16}  {found['score']:5.3f}  "
        + " ".join(f"{side:7.1f}" for side in found["bbox"])
        for found in answer["detections"]
    ]
    return lines or [f"{image:{image_width}}  (nothing)"]


def json_line(image: str, outcome: Outcome) -> str:
    """The outcome as one line of JSON: the image's name with the server's answer or the error."""
    from lib.server.answers import ServerAnswerError

    if outcome.answer is not None:
        return json.dumps({"image": image, **outcome.answer})
    error: dict[str, Any] = {"message": str(outcome.error)}
    if isinstance(outcome.error, ServerAnswerError):
        error = {"code": outcome.error.status, "type": outcome.error.kind, "message": outcome.error.message}
    return json.dumps({"image": image, "error": error})


def main(argv: Sequence[str] | None = None) -> int:
    """Detect in the images; 0 if all were answered, 1 if one failed, 2 if none was sent."""
    return run_command(_run, _parser(), argv, error_code=2)


def _run(arguments: argparse.Namespace) -> int:
    from lib.images import find_images
    from lib.server.client import DetectionClient

    images = find_images(arguments.images, arguments.recursive)
    with ExitStack() as stack:
        client = stack.enter_context(
            DetectionClient(arguments.url, arguments.timeout, arguments.retry_seconds)
        )
        client.require_server()
        json_lines = None
        if arguments.jsonl is not None:
            arguments.jsonl.parent.mkdir(parents=True, exist_ok=True)
            json_lines = stack.enter_context(
                arguments.jsonl.open("w", buffering=1)
            )  # a line is there at once
        if arguments.draw is not None:
            arguments.draw.mkdir(parents=True, exist_ok=True)
        failures = _detect(client, images, arguments, json_lines)
    if client.repeated:
        print(f"detect: {client.repeated} requests were sent again", file=sys.stderr)
    if failures:
        summary = f"detect: {len(failures)} of {len(images)} images failed:"
        print(summary, *failures, sep="\n  ", file=sys.stderr)
        return 1
    return 0


def _detect(
    client: DetectionClient,
    images: Sequence[Path],
    arguments: argparse.Namespace,
    json_lines: TextIO | None,
) -> list[str]:
    """Send the images and report each as it is answered; returns a line for each that failed."""
    from tqdm import tqdm

    from lib.server.client import RequestOptions

    options = RequestOptions(
        arguments.score_threshold,
        arguments.iou_threshold,
        arguments.max_detections,
        arguments.classes,
        True if arguments.class_agnostic else None,
    )
    failures = []
    shown = [printable(str(image)) for image in images]
    width = max(map(len, ("image", *shown)))
    names = drawn_names(images)
    print(f"{'image':{width}}  {'class':16}  {'score':5}  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}")
    outcomes = client.detect_many(images, options, arguments.in_flight, draw=arguments.draw is not None)
    hidden = None if arguments.progress is None else not arguments.progress
    with tqdm(total=len(images), unit="image", disable=hidden) as bar:
        for outcome in outcomes:
            image = shown[outcome.index]
            if outcome.answer is None:
                failures.append(f"{image}: {printable(str(outcome.error))}")
            else:
                # bar.write keeps the bar and the table apart where both go to one terminal.
                bar.write("\n".join(table_lines(image, outcome.answer, width)), file=sys.stdout)
            if json_lines is not None:
                json_lines.write(json_line(str(images[outcome.index]), outcome) + "\n")
            if outcome.drawn is not None:
                (arguments.draw / names[outcome.index]).write_bytes(outcome.drawn)
            bar.update()
    return failures


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image file, or folder of image files")
    add("--recursive", action="store_true", help="search sub-folders too")
    add("--url", default=DEFAULT_URL, help="address of the model's predictions (%(default)s)")
    add("--in-flight", type=positive_int, default=8, metavar="N", help="concurrent requests (%(default)s)")
    add("--timeout", type=positive_seconds, default=60.0, metavar="S", help="of each attempt (%(default)s)")
    add(
        "--retry-seconds",
        type=seconds,
        default=DEFAULT_RETRY_S,
        metavar="S",
        help="how long an image is sent again while the server is full or starts again (%(default)s)",
    )

    add = parser.add_argument_group("detection (the server's own settings where not given)").add_argument
    add("--score-threshold", type=fraction, metavar="0..1", help="lowest score of a detection")
    add("--iou-threshold", type=fraction, metavar="0..1", help="NMS drops a box above this overlap")
    add("--max-detections", type=positive_int, metavar="N", help="of an image, best scores first")
    add("--classes", type=name_list, metavar="A,B", help="only these classes, by name or id")
    add("--class-agnostic", action="store_true", help="NMS across classes")

    add = parser.add_argument_group("output").add_argument
    add("--jsonl", type=Path, metavar="FILE", help="write one line of JSON per image")
    add("--draw", type=Path, metavar="DIR", help="write the images with their boxes drawn")
    progress = argparse.BooleanOptionalAction
    add("--progress", action=progress, help="progress bar on stderr (default: if that is a terminal)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

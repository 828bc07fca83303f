"""Send images to a running server; print what it finds, write it to a file, draw it.

IMAGE: a file, a folder, a pattern (quoted or not), an http(s) address, or - for standard input.

python scripts/detect.py image.jpg
python scripts/detect.py folder 'more/*.png' --recursive --output found.jsonl --output-dir drawn
python scripts/detect.py images --coco annotations.json --output results.json
curl -s https://example.com/image.jpg | python scripts/detect.py -

Prints a line for each detection in up to 10 images (in more with --verbose), and a summary.

--output writes JSON lines (.jsonl: a line for each image, with the server's answer or the error) or a COCO
results file (.json). The ids of images and categories in it are those of --coco. Without that, images are
numbered from 1, category ids are COCO's own if all classes found are COCO's, otherwise the class id plus 1,
and NAME.images.json lists both.

Exit code: 0 if all images were answered, 1 if one failed, 2 if it cannot do what was asked, 130 after Ctrl-C
or SIGTERM; the results so far are written then, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from damoyolo_client.command_line import (
    add_client,
    command_parser,
    ended_like_ctrl_c,
    fraction,
    name_list,
    open_client,
    positive_int,
    printable,
    run_command,
)
from damoyolo_client.errors import ClientError

if TYPE_CHECKING:
    from damoyolo_client.client import Client, Outcome
    from damoyolo_client.images import Source

FEW_IMAGES = 10  # whose detections are printed without --verbose
MAX_FAILURES_SHOWN = 20
MAX_STEM_BYTES = 200  # file systems take names of 255 bytes
FORMATS = {".jsonl": "jsonl", ".json": "coco"}
RENAMED = {"--jsonl": "--output", "--draw": "--output-dir"}


class Writer(Protocol):
    """Takes the outcome of each image."""

    def add(self, source: Source, outcome: Outcome) -> None:
        """Raises ClientError: the answer cannot be written, and nothing of it was."""


class Summary:
    """Counts what was found."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.classes: Counter[str] = Counter()
        self.latencies_s: list[float] = []
        self.failures: list[str] = []
        self._start_s = time.perf_counter()

    def add(self, name: str, outcome: Outcome) -> None:
        """Count an image."""
        if outcome.answer is None:
            self.failures.append(f"{name}: {printable(str(outcome.error))}")
            return
        self.classes.update(found["label"] for found in outcome.answer["detections"])
        self.latencies_s.append(outcome.seconds)

    def text(self) -> str:
        """Two lines: what was found, and how fast."""
        spent_s = time.perf_counter() - self._start_s
        classes = ", ".join(f"{printable(label)} {count}" for label, count in self.classes.most_common())
        lines = (
            f"{self.images} images, {len(self.failures)} failed; {self.classes.total()} detections"
            f"{f': {classes}' if classes else ''}"
        )
        if not self.latencies_s:
            return lines
        rate, median_ms = len(self.latencies_s) / spent_s, statistics.median(self.latencies_s) * 1e3
        return f"{lines}\n{spent_s:.1f} s, {rate:.1f} images/s, latency p50 {median_ms:.0f} ms"

    def failure_text(self) -> str:
        """A line for each image that failed, up to MAX_FAILURES_SHOWN."""
        shown = self.failures[:MAX_FAILURES_SHOWN]
        if len(self.failures) > len(shown):
            shown.append(f"and {len(self.failures) - len(shown)} more")
        return "\n  ".join((f"detect: {len(self.failures)} of {self.images} images failed:", *shown))


def drawn_names(images: Sequence[str]) -> list[str]:
    """A file name for the drawn form of each image; no two are equal, none equals an image's own."""
    own, counts = set(images), Counter[str]()
    names = []
    for image in images:
        stem = _cut(Path(image).stem)
        name = ""
        while not name or name in own:
            counts[stem] += 1
            name = f"{stem}_detections{f'_{counts[stem]}' if counts[stem] > 1 else ''}.jpg"
        names.append(name)
    return names


def _cut(stem: str) -> str:
    """The beginning of a name that is too long to be made longer."""
    data = os.fsencode(stem)
    return stem if len(data) <= MAX_STEM_BYTES else data[:MAX_STEM_BYTES].decode(errors="ignore")


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
    from damoyolo_client.answers import ServerAnswerError

    if outcome.answer is not None:
        return json.dumps({"image": image, **outcome.answer})
    error: dict[str, Any] = {"message": str(outcome.error)}
    if isinstance(outcome.error, ServerAnswerError):
        error = {"code": outcome.error.status, "type": outcome.error.kind, "message": outcome.error.message}
    return json.dumps({"image": image, "error": error})


@contextmanager
def _json_lines(path: Path) -> Iterator[Writer]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", buffering=1) as file:  # a line is there at once

        class Lines:
            def add(self, source: Source, outcome: Outcome) -> None:
                file.write(json_line(source.name, outcome) + "\n")

        yield Lines()


@contextmanager
def _coco_results(path: Path, annotations_file: Path | None, sources: Sequence[Source]) -> Iterator[Writer]:
    """Writes the file at the end; after an interruption what was found until then."""
    from damoyolo_client.coco import Results, read_annotations

    annotations = None if annotations_file is None else read_annotations(annotations_file)
    if annotations is not None:
        annotations.require_images(sources)  # refused before anything is sent
    results = Results(annotations)

    class Collected:
        def add(self, source: Source, outcome: Outcome) -> None:
            if outcome.answer is not None:
                results.add(outcome.index + 1, source, outcome.answer)

    try:
        yield Collected()
    finally:
        results.write(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Detect in the images; 0 if all were answered, 1 if one failed, 2 for other errors."""
    return run_command(_run, _parser(), argv, error_code=2)


def _run(arguments: argparse.Namespace) -> int:
    from damoyolo_client.images import find_sources

    kind = _output_kind(arguments)
    sources = find_sources(arguments.images, arguments.recursive)
    with ended_like_ctrl_c(), ExitStack() as stack:
        client = stack.enter_context(open_client(arguments))
        client.require_server()
        writer = None
        if kind == "jsonl":
            writer = stack.enter_context(_json_lines(arguments.output))
        elif kind == "coco":
            writer = stack.enter_context(_coco_results(arguments.output, arguments.coco, sources))
        if arguments.output_dir is not None:
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
        summary = _detect(client, sources, arguments, writer)
    if not arguments.quiet:
        print(summary.text())
    if client.repeated:
        print(f"detect: {client.repeated} requests were sent again", file=sys.stderr)
    if summary.failures:
        print(summary.failure_text(), file=sys.stderr)
        return 1
    return 0


def _output_kind(arguments: argparse.Namespace) -> str | None:
    """Of --output: jsonl or coco; None without it."""
    if arguments.output is None:
        for option in ("format", "coco"):
            if getattr(arguments, option) is not None:
                raise ClientError(f"--{option} says how to write --output, which is missing")
        return None
    kind: str | None = arguments.format or FORMATS.get(arguments.output.suffix.lower())
    if kind is None:
        raise ClientError(
            f"--output is {str(arguments.output)!r}; accepted are .jsonl (JSON lines), .json (COCO "
            "results), and any other name with --format"
        )
    if kind != "coco" and arguments.coco is not None:
        raise ClientError("--coco is for COCO results: --output FILE.json, or --format coco")
    return kind


def _detect(
    client: Client, sources: Sequence[Source], arguments: argparse.Namespace, writer: Writer | None
) -> Summary:
    """Send the images and report each as it is answered."""
    from tqdm import tqdm

    from damoyolo_client.client import RequestOptions

    options = RequestOptions(
        arguments.score_threshold,
        arguments.iou_threshold,
        arguments.max_detections,
        arguments.classes,
        True if arguments.class_agnostic else None,
    )
    summary = Summary(len(sources))
    shown = [printable(source.name) for source in sources]
    width = max(map(len, ("image", *shown)))
    names = drawn_names([source.file_name() for source in sources]) if arguments.output_dir else []
    in_lines = not arguments.quiet and (arguments.verbose or len(sources) <= FEW_IMAGES)
    if in_lines:
        print(f"{'image':{width}}  {'class':16}  {'score':5}  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}")
    images = (source.image for source in sources)
    outcomes = client.detect_many(images, options, arguments.in_flight, draw=arguments.output_dir is not None)
    shows_bar = False if arguments.quiet and arguments.progress is None else arguments.progress
    with tqdm(total=len(sources), unit="image", disable=None if shows_bar is None else not shows_bar) as bar:
        for outcome in outcomes:
            file = arguments.output_dir / names[outcome.index] if names else None
            outcome = _kept(outcome, sources[outcome.index], writer, file)
            summary.add(shown[outcome.index], outcome)
            if in_lines and outcome.answer is not None:
                # bar.write keeps the bar and the table apart where both go to one terminal.
                bar.write(
                    "\n".join(table_lines(shown[outcome.index], outcome.answer, width)), file=sys.stdout
                )
            bar.update()
    return summary


def _kept(outcome: Outcome, source: Source, writer: Writer | None, drawn_file: Path | None) -> Outcome:
    """Write what came of an image; the outcome, an error if that cannot be written."""
    if outcome.drawn is not None and drawn_file is not None:
        try:
            drawn_file.write_bytes(outcome.drawn)
        except OSError as error:
            outcome = replace(outcome, answer=None, error=error)
    if writer is not None:
        try:
            writer.add(source, outcome)
        except ClientError as error:
            outcome = replace(outcome, answer=None, error=error)
    return outcome


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, RENAMED)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="file, folder, pattern, http(s) address, or -")
    add("--recursive", action="store_true", help="search sub-folders too")
    add_client(parser)
    add("--in-flight", type=positive_int, default=8, metavar="N", help="concurrent requests (%(default)s)")

    add = parser.add_argument_group("detection (the server's own settings where not given)").add_argument
    add("--score-threshold", type=fraction, metavar="0..1", help="lowest score of a detection")
    add("--iou-threshold", type=fraction, metavar="0..1", help="NMS drops a box above this overlap")
    add("--max-detections", type=positive_int, metavar="N", help="of an image, best scores first")
    add("--classes", type=name_list, metavar="A,B", help="only these classes, by name or id")
    add("--class-agnostic", action="store_true", help="NMS across classes")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="FILE", help="write the detections: .jsonl, or .json for COCO results")
    add("--format", choices=sorted(FORMATS.values()), help="of --output (by its suffix)")
    add("--coco", type=Path, metavar="FILE", help="annotations whose image and category ids the results get")
    add("--output-dir", type=Path, metavar="DIR", help="write the images with their boxes drawn")
    printed = parser.add_mutually_exclusive_group().add_argument
    printed("--quiet", action="store_true", help="print nothing but errors")
    printed("--verbose", action="store_true", help="print the detections of more than 10 images, too")
    progress = argparse.BooleanOptionalAction
    add("--progress", action=progress, help="progress bar on stderr (default: if that is a terminal)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

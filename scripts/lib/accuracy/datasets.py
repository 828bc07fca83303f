"""Read annotated images for evaluation, in COCO or Pascal VOC format."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lib.cli import ScriptError
from lib.images import require_file

MAX_COORDINATE_PX = 1e9  # the area of a larger box is no exact number any more
MIN_SIDE_PX = 2.0  # annotated objects narrower or lower than this are mistakes


@dataclass(frozen=True)
class AnnotatedObject:
    """An object in an image.

    box_xyxy: in pixels of the image.
    ignored: finding it counts neither for nor against a detector (`iscrowd` in COCO, `difficult` in VOC).
    """

    category_id: int
    box_xyxy: tuple[float, float, float, float]
    ignored: bool = False


@dataclass(frozen=True)
class AnnotatedImage:
    """An image file and the objects in it."""

    image_id: int
    path: Path
    objects: tuple[AnnotatedObject, ...]


@dataclass(frozen=True)
class DetectionDataset:
    """Annotated images.

    class_names: name of each category id.
    dropped_objects: number of annotated objects left out because a side is under MIN_SIDE_PX.
    """

    name: str
    class_names: Mapping[int, str]
    images: tuple[AnnotatedImage, ...]
    dropped_objects: int

    @property
    def object_count(self) -> int:
        """Number of annotated objects, ignored ones included."""
        return sum(len(image.objects) for image in self.images)


def read_dataset(
    voc: Path | None, split: str, coco: Path | None, coco_images: Path | None
) -> DetectionDataset | None:
    """The data set that a command was given, in one of the formats; None if it was given none.

    coco_images: folder of the images of `coco`; None for its own.

    Raises:
        ScriptError: it cannot be read, or a folder of images is given without `coco`.
    """
    if voc is not None:
        return read_voc(voc, split)
    if coco is None and coco_images is None:
        return None
    if coco is None:
        raise ScriptError("the folder of the images of --coco needs --coco")
    return read_coco(coco, coco_images or coco.parent)


def read_coco(annotations_file: Path, image_dir: Path) -> DetectionDataset:
    """A data set in COCO format: an instances JSON file whose `file_name`s are relative to `image_dir`.

    Raises:
        ScriptError: the file is not in that format, or an image is missing.
    """
    try:
        content = json.loads(require_file(annotations_file).read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: of brackets without end
        raise ScriptError(f"cannot read {annotations_file} as JSON: {error}") from error
    objects: dict[int, list[AnnotatedObject]] = {}
    try:
        class_names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        paths = {int(image["id"]): image_dir / str(image["file_name"]) for image in content["images"]}
        for annotation in content["annotations"]:
            image_id, category_id = int(annotation["image_id"]), int(annotation["category_id"])
            if image_id not in paths or category_id not in class_names:
                raise ScriptError(
                    f"{annotations_file}: annotation {annotation.get('id')} names image {image_id} and "
                    f"category {category_id}, and one of them is not listed"
                )
            x, y, width, height = _numbers(annotation["bbox"])
            box_xyxy = (x, y, x + width, y + height)
            found = AnnotatedObject(category_id, box_xyxy, bool(annotation.get("iscrowd", 0)))
            objects.setdefault(image_id, []).append(found)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # OverflowError: of an infinite id
        raise ScriptError(
            f"{annotations_file} is not in COCO instances format (images, annotations with an xywh bbox, "
            f"categories): {type(error).__name__} {error}"
        ) from error
    return _dataset(annotations_file.stem, image_dir, class_names, paths, objects)


def read_voc(voc_dir: Path, split: str) -> DetectionDataset:
    """A data set in Pascal VOC format: the images listed in ImageSets/Main/<split>.txt of `voc_dir`.

    Box coordinates are used unchanged: the width is xmax - xmin. The classes are those that occur in the
    split, in alphabetical order, with ids from 1.

    Raises:
        ScriptError: a file is missing or not in that format.
    """
    list_file = voc_dir / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = list_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ScriptError(f"{list_file} is not text in UTF-8: {error}") from error
    except OSError as error:
        splits = ", ".join(sorted(path.stem for path in list_file.parent.glob("*.txt"))) or "none"
        raise ScriptError(f"no split {split!r} in {voc_dir}; there are: {splits}") from error
    stems = [line.split()[0] for line in lines if line.strip()]
    xml_files = [voc_dir / "Annotations" / f"{stem}.xml" for stem in stems]
    for path in xml_files:
        _require_inside(path, voc_dir)
    annotations = list(map(_read_voc_annotation, xml_files))
    names = sorted({name for _, found in annotations for name, _, _ in found})
    ids = {name: category_id for category_id, name in enumerate(names, start=1)}
    paths = {}
    objects = {}
    for image_id, (stem, (file_name, found)) in enumerate(zip(stems, annotations, strict=True), start=1):
        # In some data sets the files were renamed, but not the file names in the annotations.
        by_stem = voc_dir / "JPEGImages" / f"{stem}.jpg"
        paths[image_id] = by_stem if by_stem.is_file() else voc_dir / "JPEGImages" / file_name
        objects[image_id] = [AnnotatedObject(ids[name], box, ignored) for name, box, ignored in found]
    class_names = {ids[name]: name for name in names}
    return _dataset(f"{voc_dir.resolve().name}:{split}", voc_dir, class_names, paths, objects)


_VocObject = tuple[str, tuple[float, float, float, float], bool]


def _read_voc_annotation(path: Path) -> tuple[str, list[_VocObject]]:
    """File name of the image, and (class name, box_xyxy, difficult) of each object."""
    try:
        parser = ElementTree.XMLParser(target=_PlainTree())
        root = ElementTree.parse(require_file(path), parser).getroot()
        found: list[_VocObject] = []
        for element in root.iter("object"):
            name = (element.findtext("name") or "").strip()
            if not name:
                raise ValueError("an object without a name")
            corners = [
                float(element.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
            ]
            found.append((name, _numbers(corners), element.findtext("difficult", "0").strip() == "1"))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: of an encoding
        raise ScriptError(f"cannot read the Pascal VOC annotation {path}: {error}") from error
    return root.findtext("filename", f"{path.stem}.jpg"), found


class _PlainTree(ElementTree.TreeBuilder):
    """Builds the tree of a document without a DTD: entities can make a small file a large one."""

    def doctype(self, name: str, *_: object) -> None:
        """Called at `<!DOCTYPE`, before its entities are read."""
        raise ValueError(f"it has a document type ({name}); accepted is XML without one")


def _dataset(
    name: str,
    folder: Path,
    class_names: Mapping[int, str],
    paths: Mapping[int, Path],
    objects: Mapping[int, list[AnnotatedObject]],
) -> DetectionDataset:
    """Checks names and files, and leaves out objects that are too small."""
    counts = Counter(class_name.casefold() for class_name in class_names.values())
    twice = sorted(class_name for class_name in class_names.values() if counts[class_name.casefold()] > 1)
    if twice:
        raise ScriptError(
            f"{name} has classes whose names differ only in case or not at all: {', '.join(twice)}"
        )
    for path in paths.values():
        _require_inside(path, folder)
    missing = [path for path in paths.values() if not os.path.isfile(path)]  # false for a name too long
    if missing:
        raise ScriptError(
            f"{len(missing)} of {len(paths)} images of {name} are missing, the first of them is {missing[0]}"
        )
    images = []
    for image_id, path in paths.items():
        kept = tuple(found for found in objects.get(image_id, ()) if is_large_enough(found.box_xyxy))
        images.append(AnnotatedImage(image_id, path, kept))
    annotated = sum(map(len, objects.values()))
    return DetectionDataset(
        name, class_names, tuple(images), annotated - sum(len(image.objects) for image in images)
    )


def is_large_enough(box_xyxy: tuple[float, float, float, float]) -> bool:
    """Whether both sides of a box are at least MIN_SIDE_PX."""
    x1, y1, x2, y2 = box_xyxy
    return x2 - x1 >= MIN_SIDE_PX and y2 - y1 >= MIN_SIDE_PX


def _require_inside(path: Path, folder: Path) -> None:
    """Refuse what is not below the folder: an annotation could have any file of this machine sent.

    Raises:
        ScriptError: the path, or what a symbolic link on it points to, lies elsewhere.
    """
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, too long a name, or links in a circle
        raise ScriptError(f"{str(path)!r} is not the name of a file: {error}") from error
    if not inside:
        raise ScriptError(
            f"{path} is not inside {folder}, the folder of the data set, or links to a file elsewhere; only "
            "files inside are read and sent"
        )


def _numbers(numbers: Any) -> tuple[float, float, float, float]:
    a, b, c, d = map(float, numbers)
    if not all(abs(number) <= MAX_COORDINATE_PX for number in (a, b, c, d)):  # NaN is refused, too
        raise ValueError(f"the box {numbers} is not finite, or beyond {MAX_COORDINATE_PX:g} pixels")
    return a, b, c, d

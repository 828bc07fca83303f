"""Results files in COCO's format, and the ids in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from damoyolo_client.coco_categories import COCO_CLASS_NAMES, coco_category_ids
from damoyolo_client.errors import ClientError
from damoyolo_client.images import Source, require_file

COCO_IDS = coco_category_ids(COCO_CLASS_NAMES)


class Annotations(NamedTuple):
    """What a results file takes from an annotations file.

    image_ids: by file name without folders; None for a name that is there twice.
    category_ids: by class name in lower case.
    """

    file: Path
    image_ids: Mapping[str, int | None]
    category_ids: Mapping[str, int]

    def image_id(self, file_name: str) -> int:
        """Raises ClientError: the file is not in it, or twice."""
        image_id = self.image_ids.get(file_name)
        if image_id is None:
            times = "twice" if file_name in self.image_ids else "not"
            raise ClientError(f"{file_name} is {times} among the images of {self.file}")
        return image_id

    def require_images(self, sources: Iterable[Source]) -> None:
        """Check that each source has an image id of its own.

        Raises:
            ClientError: one has none, or that of another.
        """
        taken: dict[int, Source] = {}
        for source in sources:
            image_id = self.image_id(source.file_name())
            other = taken.setdefault(image_id, source)
            if other is not source:
                raise ClientError(
                    f"{source.name} and {other.name} are both image {image_id} of {self.file}, which goes by "
                    "file names without folders; send one of them, or each with an --output of its own"
                )

    def category_id(self, label: str) -> int:
        """Raises ClientError: the class is not in it."""
        try:
            return self.category_ids[label.casefold()]
        except KeyError:
            names = ", ".join(self.category_ids)
            raise ClientError(
                f"class {label!r} is not among the categories of {self.file}: {names}"
            ) from None


def read_annotations(file: Path) -> Annotations:
    """The ids of a COCO annotations file.

    Raises:
        ClientError: it cannot be read or has another form.
    """
    try:
        content = json.loads(require_file(file).read_bytes())
        image_ids: dict[str, int | None] = {}
        for image in content["images"]:
            name = Path(str(image["file_name"])).name
            image_ids[name] = None if name in image_ids else int(image["id"])
        categories = {str(each["name"]).casefold(): int(each["id"]) for each in content["categories"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ClientError(f"{file} is no COCO annotations file: {type(error).__name__} {error}") from error
    return Annotations(file, image_ids, categories)


def default_category_ids(labels: Mapping[int, str]) -> dict[int, int]:
    """The categories of classes without an annotations file, by class id.

    labels: by class id, all that were found. They get COCO's own category ids if each has its place in COCO's
    list of classes, else the class ids plus 1. So has the server's coco_category_ids for COCO's list and for
    lists of other classes. It knows all classes of its network, and the client those that were found: the two
    differ where a network has a part of COCO's list, or the list in another order.
    """
    if labels.items() <= set(enumerate(COCO_CLASS_NAMES)):
        return {class_id: COCO_IDS[class_id] for class_id in labels}
    return {class_id: class_id + 1 for class_id in labels}


class Results:
    """Detections in COCO's results format.

    Without `annotations` images are numbered from 1, and `write` adds a file that says what the numbers mean:
    NAME.images.json beside NAME.json, for pycocotools' COCO().
    """

    def __init__(self, annotations: Annotations | None) -> None:
        self._annotations = annotations
        self._detections: list[dict[str, Any]] = []  # without annotations: class ids in place of category ids
        self._images: list[dict[str, Any]] = []
        self._labels: dict[int, str] = {}

    def add(self, number: int, source: Source, answer: Mapping[str, Any]) -> None:
        """Add what was found in an image, the `number`-th from 1.

        Raises:
            ClientError: the annotations file does not have the image or a class, or a class id has another
                label than before; then nothing is added.
        """
        given = self._annotations
        image_id = number if given is None else given.image_id(source.file_name())
        labels = dict(self._labels)
        detections = []
        for found in answer["detections"]:
            class_id, label = found["class_id"], found["label"]
            if given is not None:
                class_id = given.category_id(label)
            elif labels.setdefault(class_id, label) != label:
                raise ClientError(f"class {class_id} is {label!r}, but was {labels[class_id]!r} before")
            detections.append(coco_result(image_id, class_id, found["bbox"], found["score"]))
        self._labels = labels
        self._detections += detections
        self._images.append(
            {"id": image_id, "file_name": source.name, "width": answer["width"], "height": answer["height"]}
        )

    def write(self, path: Path) -> None:
        """Write the results file; makes its folder."""
        if self._annotations is not None:
            write_results(path, self._detections)
            return
        ids = default_category_ids(self._labels)
        write_results(path, ({**each, "category_id": ids[each["category_id"]]} for each in self._detections))
        write_index(path, self._images, {ids[class_id]: label for class_id, label in self._labels.items()})


def coco_result(image_id: int, category_id: int, box_xyxy: Sequence[float], score: float) -> dict[str, Any]:
    """A detection in COCO's form, with x, y, width, height."""
    x1, y1, x2, y2 = box_xyxy
    box = [x1, y1, round(x2 - x1, 4), round(y2 - y1, 4)]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def write_results(path: Path, detections: Iterable[Mapping[str, Any]]) -> None:
    """Write the results file; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(detections), allow_nan=False) + "\n")


def write_index(path: Path, images: Sequence[Mapping[str, Any]], categories: Mapping[int, str]) -> Path:
    """Write images and categories as a COCO file without annotations, beside the results file `path`."""
    index = path.with_name(f"{path.stem}.images.json")
    named = [{"id": number, "name": name} for number, name in sorted(categories.items())]
    index.write_text(json.dumps({"images": list(images), "categories": named, "annotations": []}) + "\n")
    return index

"""Draw synthetic blood smears whose boxes are known exactly: sample images, test data, varied load.

    python tests/data/smears/render.py output/smears --count 8 --size 1920 1080
    python tests/data/smears/render.py tests/data/smears --annotate     annotations.json of the sample images

A seed always gives the same image. Cells are as large as in 640x480 micrographs, whatever the size of the
image.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from tqdm import tqdm

CLASS_NAMES = ("Platelets", "RBC", "WBC")
BASE_SIZE_WH = (640, 480)
MIN_SIDE_PX = 128  # the largest cell needs room for its centre
JPEG_QUALITY = 92

Field = NDArray[np.float32]


class CellBox(NamedTuple):
    """A cell: its class, and its outline's box in whole pixels, x2 and y2 exclusive."""

    label: str
    x1: int
    y1: int
    x2: int
    y2: int


class CellCounts(NamedTuple):
    """How many cells to try to place; a crowded image has room for fewer."""

    red: int = 14
    white: int = 1
    platelets: int = 2


USUAL_COUNTS = CellCounts()


class Window(NamedTuple):
    """The part of the canvas that a cell can reach; everything computed for a cell has this size."""

    rows: slice
    columns: slice


class Canvas:
    """An image in the making: float32 values 0..255, the cells' centres and radii, and their boxes."""

    def __init__(self, seed, size_wh):
        self.rng = np.random.default_rng(seed)
        self.width, self.height = size_wh
        ground = np.array([226, 217, 222], np.float32) + self.rng.normal(0, 3, 3)
        self.values = np.broadcast_to(ground, (self.height, self.width, 3)).astype(np.float32)  # H, W, 3
        self.values += self.noise(160)[..., None] * 3 + self.noise(40)[..., None] * 1.2
        self.taken = []
        self.boxes = []

    def noise(self, grain_px):
        """Smooth noise of mean 0 and deviation 1 over the whole canvas, (H, W)."""
        shape = (self.height // grain_px + 3, self.width // grain_px + 3)
        grid = Image.fromarray(self.rng.normal(size=shape).astype(np.float32))
        field = np.asarray(grid.resize((self.width, self.height), Image.Resampling.BICUBIC))
        return np.asarray((field - field.mean()) / (field.std() + 1e-6), dtype=np.float32)

    def place(self, radius, spacing):
        """A free centre x, y, or None; cells keep `spacing` times the sum of their radii apart."""
        margin = radius * 0.55
        for _ in range(400):
            x = self.rng.uniform(margin, self.width - margin)
            y = self.rng.uniform(margin, self.height - margin)
            if all(np.hypot(x - a, y - b) > spacing * (radius + r) for a, b, r in self.taken):
                self.taken.append((x, y, radius))
                return x, y
        return None

    def window(self, centre_xy, reach):
        """The canvas within `reach` pixels of a centre."""
        x, y = centre_xy
        return Window(
            slice(max(0, int(y - reach)), min(self.height, int(y + reach) + 1)),
            slice(max(0, int(x - reach)), min(self.width, int(x + reach) + 1)),
        )

    def disc(self, window, centre_xy, radii_xy, wobble, lobes):
        """Distance field of a wobbly ellipse in the window: 1 on its outline, less inside."""
        tilt = self.rng.uniform(0, 3)
        rows = np.arange(window.rows.start, window.rows.stop, dtype=np.float32)[:, None]
        columns = np.arange(window.columns.start, window.columns.stop, dtype=np.float32)[None, :]
        dx, dy = columns - centre_xy[0], rows - centre_xy[1]
        u = (dx * np.cos(tilt) + dy * np.sin(tilt)) / radii_xy[0]
        v = (-dx * np.sin(tilt) + dy * np.cos(tilt)) / radii_xy[1]
        ripple = 1 + wobble * np.sin(lobes * np.arctan2(v, u) + tilt * 3) * 0.5
        return np.asarray(np.hypot(u, v) / ripple, dtype=np.float32)

    def paint(self, window, opacity, colour):
        """Blend one colour, or one per pixel, over the window."""
        part = self.values[window]
        part += (colour.astype(np.float32) - part) * opacity[..., None]

    def speckle(self, window, opacity, grain_px, strength):
        """Add texture to the window, in proportion to `opacity`."""
        texture = self.noise(grain_px)[window] * opacity
        self.values[window] += texture[..., None] * strength.astype(np.float32)

    def label(self, name, window, body):
        """Note the box of a cell."""
        ys, xs = np.nonzero(body > 0.5)
        top, left = window.rows.start, window.columns.start
        self.boxes.append(
            CellBox(
                name,
                int(xs.min()) + left,
                int(ys.min()) + top,
                int(xs.max()) + 1 + left,
                int(ys.max()) + 1 + top,
            )
        )


def edge(distance, sharpness):
    """Opacity of a shape from its distance field: 1 inside, 0 outside, one half on the outline."""
    steepness = np.minimum((distance - 1) * sharpness, 80)  # exp of more overflows float32
    return np.asarray(1 / (1 + np.exp(steepness)), dtype=np.float32)


def draw_white_cell(canvas):
    """A white cell with a lobed nucleus."""
    rng = canvas.rng
    radius = rng.uniform(72, 100)
    centre = canvas.place(radius, 1.0)
    if centre is None:
        return
    window = canvas.window(centre, radius * 2)
    body = edge(canvas.disc(window, centre, (radius, radius * rng.uniform(0.9, 1.1)), 0.05, 3), 26)
    canvas.paint(window, body * np.float32(0.93), np.array([198, 182, 214]) + rng.normal(0, 4, 3))
    lobes, start = int(rng.integers(3, 6)), rng.uniform(0, 6.3)
    nucleus = np.zeros_like(body)
    for lobe in range(lobes):
        angle = start + lobe * 1.25
        lobe_centre = (
            centre[0] + np.cos(angle) * radius * 0.40,
            centre[1] + np.sin(angle) * radius * 0.40,
        )
        lobe_radii = (radius * rng.uniform(0.46, 0.58), radius * rng.uniform(0.42, 0.54))
        nucleus = np.maximum(nucleus, edge(canvas.disc(window, lobe_centre, lobe_radii, 0.1, 2), 14))
    canvas.paint(window, nucleus * np.float32(0.95), np.array([112, 72, 158]))
    canvas.speckle(window, nucleus, 7, np.array([9.0, 7.2, 6.3]))
    canvas.label("WBC", window, body)


def draw_red_cell(canvas):
    """A red cell, paler in the middle and darker at the rim."""
    rng = canvas.rng
    radius = rng.uniform(44, 56)
    centre = canvas.place(radius, rng.uniform(0.80, 0.98))
    if centre is None:
        return
    window = canvas.window(centre, radius * 2)
    distance = canvas.disc(window, centre, (radius, radius * rng.uniform(0.88, 1.12)), 0.06, 2)
    body = edge(distance, 22)
    pallor = (np.clip(1 - distance / rng.uniform(0.45, 0.62), 0, 1) ** 1.3 * rng.uniform(0.25, 0.75))[
        ..., None
    ]
    rim = (np.exp(-(((distance - 0.93) / 0.07) ** 2)) * 14)[..., None]
    stained = np.array([206, 158, 170]) + rng.normal(0, 4, 3)
    colour = stained * (1 - pallor) + np.array([224, 205, 212]) * pallor - rim
    canvas.paint(window, body * np.float32(0.92), colour)
    canvas.label("RBC", window, body)


def draw_platelet(canvas):
    """A platelet: small, ragged, with a soft edge."""
    rng = canvas.rng
    radius = rng.uniform(13, 21)
    centre = canvas.place(radius, 1.05)
    if centre is None:
        return
    window = canvas.window(centre, radius * 4)
    body = edge(canvas.disc(window, centre, (radius, radius * rng.uniform(0.8, 1.2)), 0.2, 3), 7)
    canvas.paint(window, body * np.float32(0.85), np.array([150, 112, 178]) + rng.normal(0, 5, 3))
    canvas.speckle(window, body, 4, np.array([7.0, 7.0, 7.0]))
    canvas.label("Platelets", window, body)


def smear(seed, size_wh=BASE_SIZE_WH, counts=USUAL_COUNTS):
    """One smear: an RGB image of `size_wh`, and its cells.

    Raises:
        ValueError: a side is under MIN_SIDE_PX.
    """
    if min(size_wh) < MIN_SIDE_PX:
        raise ValueError(f"the size is {size_wh[0]}x{size_wh[1]}; both sides need {MIN_SIDE_PX} px or more")
    canvas = Canvas(seed, size_wh)
    kinds = (
        (draw_white_cell, counts.white),
        (draw_red_cell, counts.red),
        (draw_platelet, counts.platelets),
    )
    for draw, count in kinds:
        for _ in range(count):
            draw(canvas)
    grain = canvas.values + canvas.rng.normal(0, 2.2, canvas.values.shape)
    image = Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.9)), canvas.boxes


def varied_counts(seed, size_wh=BASE_SIZE_WH):
    """Numbers of cells that differ from seed to seed and are in proportion to the image's area."""
    area = size_wh[0] * size_wh[1] / (BASE_SIZE_WH[0] * BASE_SIZE_WH[1])
    red = int(np.random.default_rng(seed).integers(8, 20))
    return CellCounts(
        red=round(red * area),
        white=max(1, round((1 + (seed % 5 == 0)) * area)),
        platelets=round(seed % 4 * area),
    )


def coco_document(smears):
    """Annotations in COCO form. smears: (seed, size_wh, boxes) of each image, smear_SEED.jpg."""
    images = []
    annotations = []
    for seed, (width, height), boxes in smears:
        images.append({"id": seed, "file_name": f"smear_{seed}.jpg", "width": width, "height": height})
        for box in boxes:
            box_wh = (box.x2 - box.x1, box.y2 - box.y1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": seed,
                    "category_id": CLASS_NAMES.index(box.label) + 1,
                    "bbox": [box.x1, box.y1, *box_wh],
                    "area": box_wh[0] * box_wh[1],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASS_NAMES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def drawn_smears(arguments):
    """Draw and save the images; yields what `coco_document` takes."""
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.count)
    for seed in tqdm(seeds, disable=None):
        image, boxes = smear(seed, arguments.size, varied_counts(seed, arguments.size))
        image.save(arguments.folder / f"smear_{seed}.jpg", quality=JPEG_QUALITY)
        yield seed, arguments.size, boxes


def annotated_smears(folder):
    """What `coco_document` takes, of the images whose boxes are in a file NAME.json beside them."""
    for path in sorted(folder.glob("smear_*.jpg")):
        with Image.open(path) as image:
            size_wh = image.size
        boxes = [CellBox(*box) for box in json.loads(path.with_suffix(".json").read_text())]
        yield int(path.stem.removeprefix("smear_")), size_wh, boxes


def main(argv=None):
    """Write smears as JPEG files, and their boxes as annotations.json in COCO form."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="images (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="of the first (%(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=BASE_SIZE_WH, metavar=("W", "H"), help="in pixels"
    )
    parser.add_argument(
        "--annotate", action="store_true", help="draw nothing: annotate the images by their .json files"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.size) < MIN_SIDE_PX:
        parser.error(f"both sides of --size must be at least {MIN_SIDE_PX} px")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    smears = annotated_smears(arguments.folder) if arguments.annotate else drawn_smears(arguments)
    document = coco_document(smears)
    (arguments.folder / "annotations.json").write_text(json.dumps(document) + "\n")
    print(f"{len(document['images'])} smears with {len(document['annotations'])} cells in {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

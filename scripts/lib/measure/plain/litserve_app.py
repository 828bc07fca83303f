"""LitServe with the plain detector, after LitServe's guide "Speed up serving by 200x".

As there, the image is base64 in JSON, `{"image_data": "..."}`, and batches are stacked from tensors.

python -m lib.measure.plain.litserve_app FOLDER DEVICE PORT WORKERS BATCH_SIZE DELAY_MS
"""

# No `from __future__ import annotations`: LitServe reads annotations as objects.
import base64
import io
import sys
from pathlib import Path
from typing import Any

import litserve
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor


class PlainAPI(litserve.LitAPI):  # type: ignore[misc]
    """folder: an unpacked archive (its weights and class names)."""

    def __init__(self, folder: str, **batching: Any) -> None:
        super().__init__(**batching)
        self.folder = folder

    def setup(self, device: str) -> None:
        """Load the network."""
        from lib.measure.plain.archive import open_plain_detector

        self.model, self.class_names = open_plain_detector(Path(self.folder), torch.device(device))

    def decode_request(self, request: dict[str, str]) -> Tensor:
        """An image, (3, h, w) float32 in 0..1."""
        image = Image.open(io.BytesIO(base64.b64decode(request["image_data"]))).convert("RGB")
        return to_tensor(image)  # type: ignore[no-any-return]

    def batch(self, inputs: list[Tensor]) -> Tensor:
        """The images of a batch, which have to have one size."""
        return torch.stack(inputs)

    def predict(self, x: Tensor) -> Any:
        """What the model finds in each image. Without batching x is a single one."""
        found = self.model((x if x.ndim == 4 else x[None]).to(self.device))
        return found if x.ndim == 4 else found[0]

    def unbatch(self, output: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """It is a list already."""
        return output

    def encode_response(self, output: dict[str, Tensor]) -> dict[str, Any]:
        """As JSON."""
        rows = zip(
            output["labels"].tolist(), output["scores"].tolist(), output["boxes"].tolist(), strict=True
        )
        return {
            "detections": [
                {"label": self.class_names[label], "score": score, "bbox": box} for label, score, box in rows
            ]
        }


def main(folder: str, device: str, *numbers: str) -> None:
    """Serve until the process is ended."""
    port, workers, batch_size, delay_ms = map(int, numbers)
    api = PlainAPI(
        folder, max_batch_size=batch_size, batch_timeout=delay_ms / 1000 if batch_size > 1 else 0.0
    )
    server = litserve.LitServer(api, accelerator=device, workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main(*sys.argv[1:])

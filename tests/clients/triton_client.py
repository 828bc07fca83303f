"""Talk to a server with tritonclient.http and print what it says as JSON.

triton_client.py ADDRESS MODEL IMAGE... (an address is HOST:PORT)
"""

import base64
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

OUTPUTS = ("counts", "boxes", "scores", "class_ids", "labels")
CONCURRENCY = 6  # a batch of them has 12 images at most, which a busy machine with 2 cores does in time
TIMEOUT_S = 60.0


def image_input(images, binary, shape=None):
    """The tensor of images: their bytes as binary data, or base64 in JSON."""
    elements = images if binary else [base64.b64encode(image) for image in images]
    values = np.array(elements, dtype=object).reshape(shape or [len(images)])
    made = InferInput("image", list(values.shape), "BYTES")
    return made.set_data_from_numpy(values, binary_data=binary)


def values_of(result, names=OUTPUTS):
    """The tensors of an answer as lists, and its id."""
    values = {"id": result.get_response().get("id")}
    for name in names:
        tensor = result.as_numpy(name)
        if tensor is not None:
            items = tensor.tolist()
            values[name] = [item.decode() if isinstance(item, bytes) else item for item in items]
    return values


def error_of(call, *arguments, **options):
    """Status and message of a call that fails."""
    try:
        call(*arguments, **options)
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return None


def questions(client, model):
    """What the server says about itself."""
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "version_ready": client.is_model_ready(model, "1.0"),
        "unknown_ready": client.is_model_ready("unknown"),
        "unknown_version_ready": client.is_model_ready(model, "7.0"),
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata(model),
        "version": client.get_model_metadata(model, "1.0"),
        "config": client.get_model_config(model),
        "unknown": error_of(client.get_model_metadata, "unknown"),
        "unknown_version": error_of(client.get_model_metadata, model, "7.0"),
    }


def predictions(client, model, images):
    """One request of each form."""
    asked = [InferRequestedOutput(name, binary_data=False) for name in OUTPUTS]
    mixed = [InferRequestedOutput("labels"), InferRequestedOutput("counts", binary_data=False)]
    options = {"score_threshold": 0.6, "classes": "RBC", "max_detections": 3}
    single = [image_input(images[:1], binary=True)]
    return {
        "json": values_of(client.infer(model, [image_input(images, binary=False)], outputs=asked)),
        "binary": values_of(client.infer(model, [image_input(images, binary=True)], request_id="a b")),
        "column": values_of(client.infer(model, [image_input(images, True, [len(images), 1])])),
        "mixed": values_of(client.infer(model, single, outputs=mixed), ("labels", "counts", "boxes")),
        "options": values_of(client.infer(model, single, parameters=options)),
        "version": values_of(client.infer(model, single, model_version="1.0")),
        "sequence": values_of(client.infer(model, single, sequence_id=5, priority=1, timeout=1000)),
    }


def concurrent_predictions(client, model, images):
    """Many requests at once, each with its own images, options and form of data."""
    pending = []
    for index in range(4 * CONCURRENCY):
        count = 1 + index % 2
        options = {"max_detections": 1 + index % 5}
        tensor = image_input(images[:count], binary=index % 3 != 0)
        pending.append(client.async_infer(model, [tensor], request_id=str(index), parameters=options))
    return [values_of(each.get_result(timeout=TIMEOUT_S)) for each in pending]


def errors(client, model, images):
    """Requests that cannot be answered."""
    tensor = image_input(images[:1], binary=True)
    corrupt = image_input([images[0], images[0][:200]], binary=True)
    pixels = InferInput("image", [2, 2, 3], "UINT8").set_data_from_numpy(np.zeros((2, 2, 3), np.uint8))
    return {
        "corrupt": error_of(client.infer, model, [corrupt]),
        "no image": error_of(client.infer, model, [image_input([b"no image"], binary=True)]),
        "pixels": error_of(client.infer, model, [pixels]),
        "option": error_of(client.infer, model, [tensor], parameters={"score_threshold": 2}),
        "unknown option": error_of(client.infer, model, [tensor], parameters={"treshold": 0.5}),
        "output": error_of(client.infer, model, [tensor], outputs=[InferRequestedOutput("masks")]),
        "classification": error_of(
            client.infer, model, [tensor], outputs=[InferRequestedOutput("scores", class_count=2)]
        ),
        "unknown model": error_of(client.infer, "unknown", [tensor]),
        "unknown version": error_of(client.infer, model, [tensor], model_version="7.0"),
        "gzip": error_of(client.infer, model, [tensor], request_compression_algorithm="gzip"),
    }


def main():
    """Print one JSON document."""
    address, model, *paths = sys.argv[1:]
    images = [Path(path).read_bytes() for path in paths]
    client = InferenceServerClient(
        address, concurrency=CONCURRENCY, connection_timeout=TIMEOUT_S, network_timeout=TIMEOUT_S
    )
    found = {
        "client": f"tritonclient {importlib.metadata.version('tritonclient')}",
        "questions": questions(client, model),
        "predictions": predictions(client, model, images),
        "concurrent": concurrent_predictions(client, model, images),
        "errors": errors(client, model, images),
    }
    client.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

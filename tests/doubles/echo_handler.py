"""A TorchServe handler that answers what reached it, to test the front end without a network.

`write_echo_archive` packs this file; the worker runs it without the project's other modules.
"""

import base64
import json
import logging
import os
import time
import zipfile

from ts.metrics.metric_type_enum import MetricTypes


class EchoHandler:
    """Answers a request's fields, in base64, and its headers.

    The fields `status`, `error`, `lines`, `sleep` (seconds), `exit` and `metrics` (see `send`) ask for more.
    """

    def initialize(self, context):
        logging.getLogger().setLevel(logging.WARNING)  # as the real handler
        logging.getLogger("ts.metrics.caching_metric").setLevel(logging.INFO)

    def handle(self, data, context):
        """One answer for each row, after the longest time that a row asks for."""
        if any("exit" in row for row in data):
            os._exit(1)
        time.sleep(max(float(bytes(row.get("sleep", b"0"))) for row in data))
        return [self.answer(row, context, index) for index, row in enumerate(data)]

    def answer(self, row, context, index):
        headers = {str(name).lower(): value for name, value in context.get_all_request_header(index).items()}
        fields = {
            name: base64.b64encode(value.encode() if isinstance(value, str) else bytes(value)).decode()
            for name, value in row.items()
        }
        for number in range(int(bytes(row.get("lines", b"0")))):
            logging.warning("line %d %s", number, "." * 300)
        self.send(json.loads(bytes(row.get("metrics", b"[]"))), context)
        status = int(bytes(row.get("status", b"200")))
        context.set_response_content_type(index, "application/json")
        if status != 200:
            context.set_response_status(code=status, phrase="", idx=index)
            if "error" in row:
                return bytes(row["error"])
            error = {"code": status, "type": "EchoError", "message": f"status {status}"}
            return json.dumps(error).encode()
        return json.dumps({"fields": fields, "headers": headers}).encode()

    def send(self, metrics, context):
        """Increase counters: the name, the values of its labels, and the increment of each."""
        for name, labels, increment in metrics:
            context.metrics.get_metric(name, MetricTypes.COUNTER).add_or_update(increment, labels)


MODEL_CONFIG = {
    "batchSize": 4,
    "maxBatchDelay": 5,
    "minWorkers": 1,
    "maxWorkers": 1,
    "responseTimeout": 60,
    "startupTimeout": 120,
}


def write_echo_archive(path, name, version="1.0", **model_config):
    """Write an archive with this handler, and other settings of the model where they are given."""
    settings = {**MODEL_CONFIG, **model_config}
    manifest = {
        "createdOn": "01/01/2026 00:00:00",
        "runtime": "python",
        "model": {"modelName": name, "handler": "echo_handler.py", "modelVersion": version},
        "archiverVersion": "0.12.0",
    }
    manifest["model"]["configFile"] = "model-config.yaml"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("model-config.yaml", "".join(f"{key}: {value}\n" for key, value in settings.items()))
        archive.write(__file__, "echo_handler.py")


def echoed_field(answer, name):
    """The content of a field that reached the handler."""
    return base64.b64decode(json.loads(answer)["fields"][name])

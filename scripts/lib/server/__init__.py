"""The served model: starting TorchServe, sending images to it, reading its metrics."""

DEFAULT_URL = "http://127.0.0.1:8080/predictions/damoyolo"
DEFAULT_RETRY_S = 120.0  # of a client; a server needs less to start again

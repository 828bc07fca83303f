"""The served model: starting TorchServe, managing it, reading its metrics."""

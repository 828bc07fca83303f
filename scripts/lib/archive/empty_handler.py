"""A TorchServe handler that does nothing, to measure the requests per second of the server itself.

`members.empty_archive` packs it in place of the real handler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EmptyHandler:
    """Answers every request with the same N bytes; N is `answer_bytes` of model-config.yaml."""

    def initialize(self, context: Any) -> None:
        """Make the answer."""
        self.answer = b" " * int(context.model_yaml_config["answer_bytes"])

    def handle(self, data: Sequence[Any], _context: Any) -> list[bytes]:
        """The answer, once for each request."""
        return [self.answer] * len(data)

"""A TorchServe handler that does nothing: what it answers a second is what the server itself can do.

Packed by `members.empty_archive` in place of the real handler; it never runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EmptyHandler:
    """Answers every request with the same bytes, as many as model-config.yaml says under `answer_bytes`."""

    def initialize(self, context: Any) -> None:
        """Make the answer."""
        self.answer = b" " * int(context.model_yaml_config["answer_bytes"])

    def handle(self, data: Sequence[Any], _context: Any) -> list[bytes]:
        """The answer, once a request."""
        return [self.answer] * len(data)

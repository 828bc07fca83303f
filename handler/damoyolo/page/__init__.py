"""The page that a browser gets at the prediction URL: one HTML file that needs nothing else.

Its policy lets nothing run or load but what is inside, and lets it send to this server alone. The names of
classes come from whoever built the archive: they are data in it, and the script shows them as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from damoyolo.config import ServingConfig
from damoyolo.drawing import class_colour_rgb

CONTENT_TYPE = "text/html; charset=utf-8"
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """An HTML document and the headers that belong to it."""

    body: bytes
    headers: Mapping[str, str]


def asks_for_page(row: Mapping[str, Any], headers: Mapping[str, Any]) -> bool:
    """Whether a request without any content lists text/html as an accepted type, as browsers do."""
    if any(row.values()):
        return False
    accept = next((value for name, value in headers.items() if name.lower() == "accept"), "")
    entries = accept.lower().split(",") if isinstance(accept, str) else []
    return any(entry.split(";")[0].strip() == "text/html" for entry in entries)


def build_page(config: ServingConfig) -> Page:
    """The page for a network with these classes and defaults."""
    style, script = ((FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
    template = string.Template((FOLDER / "page.html").read_text("utf-8"))
    text = template.substitute(style=style, script=script, model=_inside_script(_facts(config)))
    headers = {
        "Content-Security-Policy": _policy(style, script),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept",  # the same address answers other clients with JSON
    }
    return Page(text.encode("utf-8"), headers)


def _facts(config: ServingConfig) -> dict[str, Any]:
    """What the script needs to know of the model; anyone who opens the page can read it."""
    return {
        "variant": config.variant,
        "classes": [
            {"name": name, "colour": "#" + bytes(class_colour_rgb(class_id, config.class_colours)).hex()}
            for class_id, name in enumerate(config.class_names)
        ],
        "score_threshold": config.score_threshold,
        "iou_threshold": config.iou_threshold,
        "image_formats": list(config.image_formats),
    }


def _inside_script(value: Any) -> str:
    """ASCII JSON for a script element: without <, neither its end nor a comment can begin in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {digest(script)}",
            f"style-src {digest(style)}",
            "img-src blob: data:",  # the chosen images; the icon
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )

"""The page for browsers: who gets it, its policy, and names that look like HTML."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from damoyolo.config import ServingConfig
from damoyolo.page import asks_for_page, build_page

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
ODD_NAMES = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "<!--",
    "a\u2028b",
    "\U0001f9ec &amp;",
)


class Elements(HTMLParser):
    """The elements of a document with their attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1][2] += data

    def named(self, tag):
        return [element for element in self.found if element[0] == tag]


def elements_of(*class_names):
    page = build_page(ServingConfig(class_names=class_names))
    return Elements(page.body.decode()), page


@pytest.mark.parametrize(
    ("row", "headers", "expected"),
    [
        ({"body": b""}, {"Accept": BROWSER}, True),
        ({}, {"accept": "TEXT/HTML"}, True),
        ({"body": b""}, {"Accept": "*/*"}, False),
        ({"body": b""}, {"Accept": "text/htmlx, image/png"}, False),
        ({"body": b""}, {}, False),
        ({"body": b""}, {"accept": {"content-type": "text/html"}}, False),  # a field of a form of that name
        ({"body": b"image"}, {"Accept": BROWSER}, False),
        ({"data": b"", "format": b"png"}, {"Accept": BROWSER}, False),
    ],
)
def test_only_an_empty_request_of_a_browser_asks_for_the_page(row, headers, expected):
    assert asks_for_page(row, headers) is expected


def test_the_page_holds_the_classes_and_the_servers_defaults():
    elements, _ = elements_of("WBC", "RBC")
    (model,) = [json.loads(text) for _, attributes, text in elements.named("script") if "id" in attributes]
    assert [entry["name"] for entry in model["classes"]] == ["WBC", "RBC"]
    assert all(re.fullmatch("#[0-9a-f]{6}", entry["colour"]) for entry in model["classes"])
    assert (model["score_threshold"], model["iou_threshold"]) == (0.25, 0.45)


def test_names_that_look_like_html_change_no_element():
    plain, _ = elements_of(*"abcde")
    odd, _ = elements_of(*ODD_NAMES)
    assert [element[:2] for element in odd.found] == [element[:2] for element in plain.found]
    (model,) = [json.loads(text) for _, attributes, text in odd.named("script") if "id" in attributes]
    assert tuple(entry["name"] for entry in model["classes"]) == ODD_NAMES


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else():
    elements, page = elements_of("a")
    policy = page.headers["Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (text,) = [text for _, attributes, text in elements.named(tag) if "id" not in attributes]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search("unsafe|http|\\*", policy)
    assert page.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_refers_to_nothing_outside_and_has_no_inline_handlers():
    elements, page = elements_of("a")
    for tag, attributes, _ in elements.found:
        assert tag in ("link", "script") or not {"src", "href"} & set(attributes), tag
        assert not {"style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    (link,) = elements.named("link")
    assert link[1]["href"].startswith("data:image/svg+xml,")
    script = page.body.decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)

"""What serve.py says and returns when its server is of no more use."""

from types import SimpleNamespace

import pytest

import serve

REASON = "a model has lost all its workers for good"


class Lines(list):
    """In place of a stream."""

    print = list.append


@pytest.fixture
def server():
    """A server without models, of which serve.py learns only why the wait ended."""
    nothing = {name: lambda *_: None for name in ("start", "wait_until_ready")}
    urls = {f"{name}_url": "http://127.0.0.1:9" for name in ("inference", "management", "metrics")}
    return SimpleNamespace(**nothing, **urls, model_names=list, wait=lambda: REASON)


def test_a_lost_model_is_one_line_of_stderr_and_code_1(server):
    out, err = Lines(), Lines()
    assert serve._serve(server, SimpleNamespace(timeout=1.0, ready_file=None), out, err) == 1
    assert err == [f"serve: {REASON}"]

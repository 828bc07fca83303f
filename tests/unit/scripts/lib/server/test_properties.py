"""Settings of the server: what is read from config.properties, and what is wrong with it."""

import pytest

from lib.cli import ScriptError
from lib.server.process import TorchServeProcess, busy_ports, local_url, read_properties


def test_addresses_that_are_not_given_are_the_server_s_own(tmp_path):
    (tmp_path / "a").write_text("# comment\nmetrics_address = http://127.0.0.1:9\nother=1=2\n")
    assert read_properties(tmp_path / "a") == {
        "inference_address": "http://127.0.0.1:8080",
        "management_address": "http://127.0.0.1:8081",
        "metrics_address": "http://127.0.0.1:9",
        "other": "1=2",
    }


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(ScriptError, match="is not text in UTF-8"):
        read_properties(tmp_path / "a")


@pytest.mark.parametrize("value", ["http://127.0.0.1", "8080x", "", "http://h:0", "http://h:70000"])
def test_a_setting_that_names_no_port_is_refused(tmp_path, value):
    (tmp_path / "a").write_text(f"metrics_address={value}\n")
    with pytest.raises(ScriptError, match="metrics_address is"):
        busy_ports(read_properties(tmp_path / "a"))


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("https://[::]:8443", "https://[::1]:8443"),
        ("http://10.0.0.0:8080", "http://10.0.0.0:8080"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_a_server_on_every_interface_is_reached_by_this_machine_s_own_address(address, url):
    assert local_url(address) == url


def test_a_server_keeps_listening_on_every_interface(project_dir, tmp_path):
    everywhere = {"inference_address": "http://0.0.0.0:8080"}
    server = TorchServeProcess(project_dir / "config.properties", tmp_path, overrides=everywhere)
    assert server.inference_url == "http://127.0.0.1:8080"
    assert server.properties["inference_address"] == "http://0.0.0.0:8080"

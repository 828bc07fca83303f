"""Model repositories for Triton, and the Triton that serves them."""

import json
import re
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lib.cli import ScriptError

from doubles.triton_server import load_module

SETTINGS = {"minWorkers": 2, "maxWorkers": 2, "batchSize": 4, "maxBatchDelay": 5, "jobQueueSize": 300}
PYTHON = "{}.{}".format(*sys.version_info)


@pytest.fixture(scope="module")
def builder(project_dir):
    return load_module(project_dir, "build_repository")


@pytest.fixture(scope="module")
def program(project_dir):
    return load_module(project_dir, "program")


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / "cells.mar")


def write_archive(path, left_out=()):
    manifest = {"model": {"modelName": "cells", "modelVersion": "1.0", "handler": "damoyolo_handler.py"}}
    members = {
        "MAR-INF/MANIFEST.json": json.dumps(manifest),
        "model-config.yaml": yaml.safe_dump({**SETTINGS, "handler": {"variant": "S"}}),
        "damoyolo_handler.py": "",
        "damoyolo/opening.py": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name not in left_out:
                archive.writestr(name, content)
    return path


def config_value(folder, key):
    return re.search(rf"\b{key}: (?:\[ )?(\S+)", (folder / "cells/config.pbtxt").read_text()).group(1)


def test_the_repository_has_the_archives_settings(builder, archive, tmp_path, project_dir):
    assert builder.build_repository(archive, tmp_path) == "cells"
    version = tmp_path / "cells/1"
    assert (version / "model.py").read_text() == (project_dir / "deploy/triton/model.py").read_text()
    assert yaml.safe_load((version / "archive/model-config.yaml").read_text())["batchSize"] == 4
    expected = {
        "name": '"cells"',
        "max_batch_size": "4",
        "preferred_batch_size": "4",
        "max_queue_delay_microseconds": "5000",
        "max_queue_size": "300",
        "kind": "KIND_AUTO",
        "count": "2",
    }
    assert {key: config_value(tmp_path, key) for key in expected} == expected


def test_options_replace_the_archives_settings_and_the_graphs_follow(builder, archive, tmp_path):
    builder.build_repository(archive, tmp_path, "cuda", batch_size=16, delay_ms=1, workers=3)
    settings = yaml.safe_load((tmp_path / "cells/1/archive/model-config.yaml").read_text())
    assert (settings["batchSize"], settings["maxBatchDelay"], settings["minWorkers"]) == (16, 1, 3)
    assert settings["handler"] == {"variant": "S", "graph_batch_sizes": [1, 2, 4, 8, 12, 16]}
    assert config_value(tmp_path, "max_batch_size") == "16"
    assert config_value(tmp_path, "kind") == "KIND_GPU"
    assert sorted(path.name for path in (tmp_path / "cells/1").iterdir()) == ["archive", "model.py"]


def test_a_model_of_the_command_is_replaced_and_nothing_else(builder, archive, tmp_path):
    builder.build_repository(archive, tmp_path)
    builder.build_repository(archive, tmp_path, workers=1)
    assert config_value(tmp_path, "count") == "1"
    other = tmp_path / "other"
    (other / "cells").mkdir(parents=True)
    with pytest.raises(ScriptError, match="--output-dir"):
        builder.build_repository(archive, other)


def test_an_archive_of_an_older_version_is_refused_and_replaces_nothing(builder, archive, tmp_path):
    builder.build_repository(archive, tmp_path)
    old = write_archive(tmp_path / "old.mar", left_out=["damoyolo/opening.py"])
    with pytest.raises(ScriptError, match=r"damoyolo/opening\.py.*build_archive"):
        builder.build_repository(old, tmp_path)
    assert (tmp_path / "cells/1/model.py").exists()


@pytest.mark.parametrize("value", [None, "left out"])
def test_keys_that_only_a_server_reads_have_torchserves_defaults(builder, tmp_path, monkeypatch, value):
    settings = {**SETTINGS, "jobQueueSize": value}
    if value:
        del settings["jobQueueSize"]
    monkeypatch.setitem(globals(), "SETTINGS", settings)
    builder.build_repository(write_archive(tmp_path / "cells.mar"), tmp_path)
    assert config_value(tmp_path, "max_queue_size") == "100"


def test_the_command_says_where_the_repository_is(builder, archive, tmp_path, capsys):
    folder = tmp_path / "repository"
    assert builder.main(["--archive", str(archive), "--output-dir", str(folder), "--device", "cpu"]) == 0
    assert f"--model-repository={folder}" in capsys.readouterr().out
    assert config_value(folder, "kind") == "KIND_CPU"


def make_environment(folder, *files):
    packages = folder / "lib" / f"python{PYTHON}" / "site-packages"
    for file in files:
        (packages / file).parent.mkdir(parents=True, exist_ok=True)
        (packages / file).write_text("")
    return folder


WHEEL = "pytriton/tritonserver"
SERVER = f"{WHEEL}/bin/tritonserver"
STUB = f"{WHEEL}/python_backend_stubs/{PYTHON}/triton_python_backend_stub"
LIBRARY = f"{WHEEL}/backends/python/libtriton_python.so"
NUMPY = "numpy/__init__.py"


def test_the_wheels_server_gets_its_backend_libraries_and_packages(program, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "find_libpython", lambda _: tmp_path / "lib/libpython.so")
    environment = make_environment(tmp_path / "venv", SERVER, STUB, LIBRARY, NUMPY)
    found = program.find_program(tmp_path, environment)
    assert found.path.is_file()
    assert found.arguments == [f"--backend-directory={tmp_path / 'backends'}"]
    names = sorted(path.name for path in (tmp_path / "backends/python").iterdir())
    assert names == ["libtriton_python.so", "triton_python_backend_stub"]
    assert found.environment["PATH"].startswith(f"{environment / 'bin'}:")
    assert found.environment["LD_LIBRARY_PATH"].startswith(f"{tmp_path / 'lib'}:")


@pytest.mark.parametrize("files", [(SERVER, STUB, LIBRARY), (SERVER, LIBRARY, NUMPY)], ids=["NumPy", "stub"])
def test_a_python_without_the_wheels_parts_is_named(program, tmp_path, files):
    with pytest.raises(ScriptError, match=f"does not run with Python {PYTHON}"):
        program.find_program(tmp_path, make_environment(tmp_path / "venv", *files))


def test_a_missing_server_or_library_is_named(program, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "INSTALLED", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScriptError, match=r"no Triton server.*setup_triton.* installs that"):
        program.find_program(tmp_path, tmp_path / "venv")
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: None)
    monkeypatch.setattr("pathlib.Path.is_file", lambda _: False)
    with pytest.raises(ScriptError, match=rf"libpython{PYTHON}\.so\.1\.0 is not in .*--enable-shared"):
        program.find_libpython()


def test_an_installed_server_is_taken_as_it_is(program, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "INSTALLED", tmp_path)
    server = tmp_path / "bin/tritonserver"
    server.parent.mkdir()
    server.write_text("")
    server.chmod(0o755)
    found = program.find_program(tmp_path, tmp_path / "venv")
    assert (found.path, found.arguments, found.environment) == (server, [], {})


def test_a_signal_while_the_server_starts_ends_it(project_dir, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(project_dir / "deploy/triton"))
    serve = load_module(project_dir, "serve")
    server = tmp_path / "tritonserver"
    server.write_text("#!/bin/sh\nexec sleep 60\n")
    server.chmod(0o755)
    started = []

    class Watcher:
        def __init__(self, *_):
            pass

        def kill_group_too(self, group):
            signal.raise_signal(signal.SIGTERM)
            started.append(group)

        def dismiss(self):
            pass

    found = SimpleNamespace(path=server, arguments=[], environment={})
    monkeypatch.setattr(serve, "find_program", lambda _: found)
    monkeypatch.setattr(serve, "build_from", lambda *_: "damoyolo")
    monkeypatch.setattr("lib.server.watcher.Watcher", Watcher)
    before = {number: signal.getsignal(number) for number in serve.STOP_SIGNALS}
    try:
        assert serve._run(serve._parser().parse_args(["--any-port"])) == 0
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    assert "SIGTERM, answering" in capsys.readouterr().err
    assert not Path(f"/proc/{started[0]}").exists()


@pytest.mark.parametrize("port", ["80", "65534"])
def test_ports_without_room_for_three_are_refused(project_dir, port):
    command = [sys.executable, str(project_dir / "deploy/triton/serve.py"), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "accepted is a port from 1024 to 65533" in done.stderr


def test_a_taken_port_is_named(project_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, str(project_dir / "deploy/triton/serve.py"), "--port", str(port - 2)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(
        rf".*another program listens on port .*{port}; use --port or --any-port\n", done.stderr
    )

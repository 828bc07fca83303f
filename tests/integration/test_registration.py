"""What the management API registers: nothing by default, files of the model store where it is on."""

import grpc
import pytest
import requests

from lib.archive.members import copy_archive
from lib.cli import ScriptError
from lib.server.process import TorchServeProcess

from doubles.grpc_client import _field
from doubles.tracing_handler import write_archive, write_folder, write_workflow

TIMEOUT_S = 60.0
GRPC_SERVICE = "org.pytorch.serve.grpc.management.ManagementAPIsService"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model store in `store`; `elsewhere` is a model outside it. Running either leaves the file `trace`."""
    folder = tmp_path_factory.mktemp("registration")
    (folder / "store").mkdir()
    for name in ("first", "second"):
        write_archive(folder / "store" / f"{name}.mar", folder / "trace")
    outside = "../" * 12 + str(folder / "slipped")[1:]
    write_archive(folder / "store" / "slip.mar", folder / "trace", **{outside: "out of the folder"})
    write_workflow(folder / "store" / "flow.war", folder / "trace", "second.mar")
    write_folder(folder / "elsewhere", folder / "trace")
    write_archive(folder / "outside.mar", folder / "trace")
    return folder


@pytest.fixture(scope="module")
def closed(folder, project_dir):
    """A server as it is configured."""
    yield from started(folder, project_dir, [])


@pytest.fixture(scope="module")
def opened(folder, project_dir):
    """A server whose operator switched the model API on."""
    yield from started(folder, project_dir, ["--enable-model-api"])


def started(folder, project_dir, arguments):
    server = TorchServeProcess(
        project_dir / "config.properties",
        folder / "store",
        overrides={"load_models": "first.mar"},
        use_free_ports=True,
        arguments=arguments,
    )
    with server.running(120.0):
        yield server


@pytest.fixture(autouse=True)
def nothing_ran(request, folder):
    """After a test no other handler has run, nothing new is registered and the store holds what it held."""
    before = sorted(path.name for path in (folder / "store").iterdir())
    servers = [request.getfixturevalue(name) for name in ("closed", "opened") if name in request.fixturenames]
    (folder / "trace").unlink(missing_ok=True)
    yield
    assert not (folder / "trace").exists()
    assert not (folder / "slipped").exists()
    assert sorted(path.name for path in (folder / "store").iterdir()) == before
    for server in servers:
        assert server.model_names() == ["first"]


def ask(server, method, path, **parameters):
    answer = requests.request(method, f"{server.management_url}{path}", params=parameters, timeout=TIMEOUT_S)
    assert "Traceback" not in answer.text
    assert ".java" not in answer.text
    return answer


def register(server, **parameters):
    """Status of a registration that would start a worker."""
    answer = ask(server, "POST", "/models", initial_workers="1", synchronous="true", **parameters)
    return answer.status_code


def addresses_of(folder):
    """Addresses that are no file of the store."""
    return [
        "file:///dev/null",
        "FILE:///dev/null",
        f"file://{folder}/outside.mar",
        f"file://{folder}/elsewhere",
        "http://127.0.0.1:9/evil.mar",
        "https://127.0.0.1:9/evil.mar",
        "ftp://127.0.0.1:9/evil.mar",
        f"jar:file://{folder}/outside.mar!/tracing.py",
        "../outside.mar",
        "..%2foutside.mar",
        str(folder / "elsewhere"),
        str(folder / "outside.mar"),
        "unknown.mar",
        "",
    ]


def test_by_default_nothing_is_registered_or_removed(closed, folder):
    for url in [*addresses_of(folder), "second.mar"]:
        assert register(closed, url=url) in (400, 405), url
    assert ask(closed, "DELETE", "/models/first").status_code == 405


def test_nothing_outside_the_store_is_registered(opened, folder):
    found = {url: register(opened, url=url) for url in addresses_of(folder)}
    assert set(found.values()) <= {400, 404}, found
    assert found[str(folder / "elsewhere")] == 400


@pytest.mark.parametrize(
    "name", ["../../evil", "<script>", "a\nb", "a b", ".", "-x", "", "x" * 101, "ä", "a/b"]
)
def test_a_name_that_is_no_plain_word_is_refused(opened, name):
    assert register(opened, url="second.mar", model_name=name) == 400


def test_another_handler_than_the_archive_s_is_refused(opened):
    assert register(opened, url="second.mar", handler="os:system") == 400


def test_an_archive_with_members_outside_its_folder_is_refused(opened):
    assert register(opened, url="slip.mar") in (400, 500)


def test_workflows_are_not_registered(closed, opened, folder):
    """TorchServe registers them, and the models they name, even with the model API off."""
    for server in (closed, opened):
        for url in [*addresses_of(folder), "flow.war", "production", "front-end"]:
            assert ask(server, "POST", "/workflows", url=url).status_code in (400, 404, 405), url
        assert ask(server, "GET", "/workflows").json() == {"workflows": []}


@pytest.mark.parametrize(
    ("which", "url", "status"),
    [
        ("closed", "second.mar", "PERMISSION_DENIED"),
        ("opened", "elsewhere", "INVALID_ARGUMENT"),
        ("opened", "file:///dev/null", "INVALID_ARGUMENT"),
    ],
)
def test_grpc_refuses_the_same(request, closed, opened, folder, which, url, status):
    server = request.getfixturevalue(which)
    message = _field(9, str(folder / url if url == "elsewhere" else url).encode())
    address = f"127.0.0.1:{server.properties['grpc_management_port']}"
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary(f"/{GRPC_SERVICE}/RegisterModel")(message, TIMEOUT_S)
        assert raised.value.code().name == status


def test_a_file_of_the_store_is_registered_and_removed(opened, folder):
    assert register(opened, url="second.mar", model_name="second-1.0_x") == 200
    assert (folder / "trace").exists()
    assert ask(opened, "DELETE", "/models/second-1.0_x").status_code == 200
    (folder / "trace").unlink()


@pytest.mark.slow
def test_a_server_does_not_start_with_weights_that_are_not_those_of_the_sums(archive, tmp_path, project_dir):
    sums = b"0" * 64 + b"  damoyolo.pth\n"
    copy_archive(archive.path, tmp_path / "damoyolo.mar", {"SHA256SUMS": sums})
    server = TorchServeProcess(project_dir / "config.properties", tmp_path, use_free_ports=True)
    message = r"SHA256SUMS says 000.* damaged or was exchanged"
    with pytest.raises(ScriptError, match=message), server.running(120.0):
        pass

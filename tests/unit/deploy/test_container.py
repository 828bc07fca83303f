"""The Dockerfile and its scripts keep the rules that make its image small, repeatable and harmless."""

import contextlib
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lib.server.process import read_properties

PROJECT_DIR = Path(__file__).resolve().parents[3]
CONTAINER_DIR = PROJECT_DIR / "deploy/container"
SCRIPTS = sorted(CONTAINER_DIR.glob("*.sh"))
# What the container's settings have in place of the project's.
DIFFERENT = {
    "inference_address": "http://0.0.0.0:8080",
    "metrics_address": "http://0.0.0.0:8082",
    "front_end_drain_delay_s": "5",
}


@pytest.fixture(scope="module")
def instructions():
    """The Dockerfile's instructions with their arguments, continued lines as one."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (CONTAINER_DIR / "Dockerfile").read_text())
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line]


def of(instructions, name):
    return [arguments for instruction, arguments in instructions if instruction == name]


def run_tool(name, *arguments):
    program = shutil.which(name)
    assert program is not None, f"{name} is missing; requirements-dev.txt has it"
    done = subprocess.run([program, *arguments], cwd=PROJECT_DIR, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def build_step(*steps, **environment):
    command = [str(CONTAINER_DIR / "build.sh"), *steps]
    environment = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)


def test_hadolint_finds_nothing():
    run_tool("hadolint", "--failure-threshold=info", "deploy/container/Dockerfile")


def test_shellcheck_finds_nothing():
    # SC1091: it does not follow into setup_environment.sh. SC2016: a dollar sign for sed.
    run_tool("shellcheck", "--exclude=SC1091,SC2016", *map(str, SCRIPTS))


def test_every_run_is_a_step_of_build_sh_and_every_step_is_run(instructions):
    steps = []
    for run in of(instructions, "RUN"):
        program, *arguments = re.findall(r'"([^"]*)"', run)
        assert program == "deploy/container/build.sh", run
        steps += arguments
    usage = build_step().stderr
    assert set(steps) == set(re.findall(r"(?m)^  build\.sh (\S+)", usage)) - {"requirements"}


def test_the_base_is_a_release_of_debian_and_no_other_image_is_taken(instructions):
    (base,) = (each for each in of(instructions, "ARG") if each.startswith("BASE_IMAGE="))
    assert re.fullmatch(r"BASE_IMAGE=debian:\d+\.\d+-slim(@sha256:[0-9a-f]{64})?", base)
    stages = dict(reversed(each.split(" AS ")) for each in of(instructions, "FROM"))
    assert set(stages.values()) == {"${BASE_IMAGE}", "system", "${VARIANT}"}
    assert {"cpu", "cuda"} <= set(stages)


def test_the_last_stage_installs_nothing_and_runs_as_an_ordinary_user(instructions):
    last = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    runtime = dict(instructions[last:])
    assert "RUN" not in runtime
    assert runtime["USER"] == "10001:10001"
    assert runtime["STOPSIGNAL"] == "SIGTERM"
    # As a list: a shell in between would not pass on the signal.
    assert runtime["ENTRYPOINT"] == '["/opt/damoyolo/deploy/container/start.sh"]'


def test_what_is_copied_is_there_and_not_ignored(instructions):
    ignored = (CONTAINER_DIR / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    for path in kept:
        assert (PROJECT_DIR / path).exists(), path
    sources = [
        source for each in of(instructions, "COPY") if "--from=" not in each for source in each.split()[:-1]
    ]
    for source in sources:
        inside = [path for path in kept if path == source or Path(path).is_relative_to(source)]
        assert inside or any(Path(source).is_relative_to(path) for path in kept), source


def test_the_settings_are_the_project_s_but_for_the_network():
    project = read_properties(PROJECT_DIR / "config.properties")
    assert read_properties(CONTAINER_DIR / "config.properties") == {**project, **DIFFERENT}


def test_the_label_has_the_project_s_version(instructions):
    version = re.search(r'(?m)^version = "(.*)"', (PROJECT_DIR / "pyproject.toml").read_text()).group(1)
    (labels,) = of(instructions, "LABEL")
    assert f'org.opencontainers.image.version="{version}"' in labels


def test_the_cpu_image_has_the_same_pins_without_those_of_cuda():
    pins = (PROJECT_DIR / "requirements.txt").read_text().splitlines()
    cpu = build_step("requirements", VARIANT="cpu", TORCH_CPU_INDEX="https://example.org").stdout.splitlines()
    of_cuda = [pin for pin in pins if re.match(r"nvidia-|cuda-|triton==", pin)]
    assert len(of_cuda) > 10
    assert [pin.replace("+cpu", "") for pin in cpu] == [pin for pin in pins if pin not in of_cuda]
    assert [pin.split("==")[0] for pin in cpu if "+cpu" in pin] == ["torch", "torchvision"]


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_without_pytorch_s_index_an_image_has_all_pins(variant):
    printed = build_step("requirements", VARIANT=variant, TORCH_CPU_INDEX="").stdout
    assert printed == (PROJECT_DIR / "requirements.txt").read_text()


@pytest.mark.parametrize("step", ["nonsense", ""])
def test_an_unknown_step_shows_the_steps(step):
    done = build_step(step)
    assert done.returncode == 2
    assert "build.sh python-packages" in done.stderr


@pytest.fixture
def config(tmp_path):
    """Settings whose port of inference has a stand-in that is live and not ready."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = {"/v2/health/live": (200, b"yes"), "/v2/health/ready": (503, b"no worker")}[
                self.path
            ]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        path = tmp_path / "config.properties"
        path.write_text(f"# inference_address=x:1\ninference_address = http://0.0.0.0:{server.server_port}\n")
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            yield path


def health(*arguments, **environment):
    environment = {"PATH": "/usr/bin:/bin", "http_proxy": "http://127.0.0.1:9", **environment}
    command = [str(CONTAINER_DIR / "health.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


def test_health_is_readiness_and_says_why_not(config):
    done = health(DAMOYOLO_CONFIG=str(config))
    assert (done.returncode, done.stderr) == (1, "no worker\n")


def test_health_is_liveness_if_asked(config):
    done = health("live", DAMOYOLO_CONFIG=str(config))
    assert (done.returncode, done.stdout) == (0, "yes\n")


def test_health_without_a_server_is_1_and_names_the_address(tmp_path):
    config = tmp_path / "config.properties"
    config.write_text("inference_address=http://0.0.0.0:1\n")
    done = health(DAMOYOLO_CONFIG=str(config))
    assert done.returncode == 1
    assert "http://127.0.0.1:1/v2/health/ready" in done.stderr


@pytest.fixture
def started(tmp_path):
    """Runs start.sh with a stand-in for tini; the words of the command line that tini gets."""
    tini = tmp_path / "tini"
    tini.write_text('#!/bin/sh\necho "$PWD" "$@" "HOME=$HOME"\n')
    tini.chmod(0o755)

    def run(*arguments, **environment):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **environment}
        command = [str(CONTAINER_DIR / "start.sh"), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30
        ).stdout.split()

    return run


def test_the_container_starts_serve_py_with_its_own_settings(started):
    folder, *command = started()
    assert Path(folder) == PROJECT_DIR
    settings = "--ts-config deploy/container/config.properties --model-store model_store"
    served = f"-s -- .venv/bin/python scripts/serve.py {settings} --log-dir /tmp/damoyolo-logs HOME=/tmp"
    assert command == served.split()


def test_variables_and_arguments_change_the_start(started, tmp_path):
    variables = {"DAMOYOLO_CONFIG": "/c", "DAMOYOLO_MODEL_STORE": "/m", "DAMOYOLO_LOG_DIR": "/l"}
    command = started("--mps", HOME=str(tmp_path), **variables)
    assert command[5:-1] == ["--ts-config", "/c", "--model-store", "/m", "--log-dir", "/l", "--mps"]
    assert command[-1] == f"HOME={tmp_path}"

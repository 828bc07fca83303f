"""A pod of a rendered Deployment, run as a kubelet and a container runtime would.

It has a network namespace of its own. bwrap takes the place of the runtime: the files of the image read only,
as user 10001 without capabilities; only the emptyDirs of the manifest can be written, each a tmpfs of its
sizeLimit; the ConfigMap's files lie where the manifest mounts them. Of the securityContext, seccomp is not
applied. The image's system is this machine's /usr.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import requests

from lib.server.java import find_java_home

from doubles.manifests import container_of, in_bytes, only, pod_template, port_number
from doubles.network_namespaces import joined_namespace, why_not

PROGRAMS = ("bwrap", "ip", "setpriv", "ss", "tini")
# What the image has of the project (deploy/container/Dockerfile).
CONTENT = ("handler", "scripts", "deploy", "LICENSE", "NOTICE")
# Of the system's settings: where Java, certificates and fonts are found.
SYSTEM = (
    "alternatives",
    "java-*",
    "ssl",
    "ld.so.cache",
    "ld.so.conf.d",
    "fonts",
    "nsswitch.conf",
    "localtime",
)
SHM_BYTES = 64 * 2**20  # what a runtime gives /dev/shm
# Every pod has these, whatever enableServiceLinks says.
CLUSTER = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def missing():
    """Why pods cannot run here; empty if they can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else why_not()


def image_settings(dockerfile):
    """Command line, variables, user and folder of the image, from the last stage of the Dockerfile."""
    stage = re.split(r"(?m)^FROM .*$", dockerfile.read_text())[-1].replace("\\\n", " ")
    fields = dict(re.findall(r"(?m)^(ENTRYPOINT|USER|WORKDIR) +(.*)$", stage))
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    pairs = re.findall(r"(\w+)=(\S+)", re.search(r"(?m)^ENV (.*)$", stage)[1])
    variables = {"PATH": path, **{key: value.replace("$PATH", path) for key, value in pairs}}
    return json.loads(fields["ENTRYPOINT"]), variables, fields["USER"], fields["WORKDIR"]


class Pod:
    """One pod; `address` is its own.

    documents: of the overlay.
    archive: what the image's build puts into its model store.
    folder: of this pod, to be written.
    """

    def __init__(self, documents, project_dir, archive, folder):
        self.documents, self.project_dir, self.archive, self.folder = documents, project_dir, archive, folder
        self.template, self.container = pod_template(documents), container_of(documents)
        self.entrypoint, self.variables, self.user, self.workdir = image_settings(
            project_dir / "deploy/container/Dockerfile"
        )
        self.namespace = self.address = self.process = None
        self.started_s = 0.0

    @contextlib.contextmanager
    def running(self):
        """The container started inside the context; nothing of it is left afterwards."""
        self.folder.mkdir()
        with joined_namespace() as namespace, contextlib.ExitStack() as ended:
            self.namespace, self.address = namespace.name, namespace.address
            ended.callback(self._kill)
            self._start()
            yield self

    def _kill(self):
        """End what still runs."""
        if self.process is not None:
            self.process.kill()  # bwrap; --die-with-parent ends the container
            self.process.wait(30)

    def command_line(self):
        """What the runtime starts: the image's entry point or the manifest's command, and its arguments."""
        return [*self.container.get("command", self.entrypoint), *self.container.get("args", [])]

    def _start(self):
        security = {**self.template["spec"]["securityContext"], **self.container["securityContext"]}
        user, group = security["runAsUser"], security["runAsGroup"]
        assert self.user == f"{user}:{group}"
        drop = ["--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        information, to_write = os.pipe()
        command = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            "bwrap",
            *self._sandbox(),
            "--info-fd",
            str(to_write),
        ]
        command += ["setpriv", f"--reuid={user}", f"--regid={group}", *drop, "--", *self.command_line()]
        with (self.folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[to_write]
            )
        os.close(to_write)
        with os.fdopen(information) as file:
            self.pid = json.load(file)["child-pid"]

    def _sandbox(self):
        """Arguments of bwrap."""
        apart = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1", "--die-with-parent"]
        # For setpriv, which then gives them all up.
        rights = [part for name in ("SETUID", "SETGID", "SETPCAP") for part in ("--cap-add", f"CAP_{name}")]
        system = read_only("/usr") + read_only("/sys") + ["--proc", "/proc", "--dev", "/dev"]
        for name in ("bin", "sbin", "lib", "lib64"):
            system += ["--symlink", f"usr/{name}", f"/{name}"]
        for path in (each for pattern in SYSTEM for each in Path("/etc").glob(pattern)):
            system += read_only(path)
        for path in (sys.base_prefix, str(find_java_home())):
            system += [] if path.startswith("/usr/") else read_only(path)
        mounts = [*system, *self._image(), *tmpfs("/dev/shm", SHM_BYTES, "1777"), *self._volumes()]
        settings = ["--remount-ro", "/", "--chdir", self.workdir, "--clearenv", *self._environment()]
        return [*apart, *rights, *folders_of(mounts), *mounts, *settings]

    def _image(self):
        """The files of the project in the image, and who 10001 is."""
        user, group = self.user.split(":")
        (self.folder / "passwd").write_text(
            f"damoyolo:x:{user}:{group}::{self.variables['HOME']}:/bin/false\n"
        )
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.namespace}\n")
        arguments = []
        for name in ("passwd", "hosts"):
            arguments += read_only(self.folder / name, f"/etc/{name}")
        for name in CONTENT:
            arguments += read_only(self.project_dir / name, f"{self.workdir}/{name}")
        arguments += read_only(Path(sys.prefix).resolve(), f"{self.workdir}/.venv")
        if any(each["name"] == "DAMOYOLO_MODEL_STORE" for each in self.container["env"]):
            return arguments  # so that a test finds out where the archive came from
        return arguments + read_only(self.archive, f"{self.workdir}/model_store/damoyolo.mar")

    def _volumes(self):
        """The volumes of the manifest, where it mounts them."""
        volumes = {each["name"]: each for each in self.template["spec"]["volumes"]}
        arguments = []
        for mount in self.container["volumeMounts"]:
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if "emptyDir" in volume:
                arguments += tmpfs(path, in_bytes(volume["emptyDir"]["sizeLimit"]), "0777")
            elif "configMap" in volume:
                arguments += read_only(self._write_config(volume["configMap"]["name"]), path)
            else:  # a claim: the store that somebody has filled
                assert mount["readOnly"], mount
                arguments += read_only(self._fill_claim(), path)
        return arguments

    def _write_config(self, name):
        """The files of a ConfigMap, in a folder."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for file, text in self.documents["ConfigMap", name]["data"].items():
            (folder / file).write_text(text)
        return folder

    def _fill_claim(self):
        """A model store that every user may read; a folder of pytest is for root alone."""
        folder = self.folder / "claim"
        folder.mkdir()
        shutil.copy(self.archive, folder / "damoyolo.mar")
        return folder

    def _environment(self):
        named = {each["name"]: each["value"] for each in self.container["env"]}
        variables = {**self.variables, **CLUSTER, "HOSTNAME": self.namespace, **named}
        return [part for key, value in variables.items() for part in ("--setenv", key, value)]

    def output(self):
        """What the container has printed."""
        return (self.folder / "output").read_text()

    def url(self, port, path):
        """An address on the pod; the port by its name or number."""
        return f"http://{self.address}:{port_number(self.container, port)}{path}"

    def passes(self, probe):
        """Whether one probe of this name succeeds, by the kubelet's rules."""
        asked = self.container[probe]
        http = asked["httpGet"]
        with contextlib.suppress(requests.RequestException):
            answer = requests.get(self.url(http["port"], http["path"]), timeout=asked["timeoutSeconds"])
            return 200 <= answer.status_code < 400
        return False

    def wait_until_started(self):
        """Ask the startup probe as often as the kubelet would; the time that it took, in seconds."""
        probe, begin = self.container["startupProbe"], time.monotonic()
        for _ in range(probe["failureThreshold"]):
            assert self.process.poll() is None, self.output()
            if self.passes("startupProbe"):
                self.started_s = time.monotonic() - begin
                return self.started_s
            time.sleep(probe["periodSeconds"])
        raise AssertionError(f"the kubelet would have restarted the container:\n{self.output()}")

    def listening(self):
        """Addresses, with ports, on which the pod listens, but for those that only itself reaches."""
        command = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            "ss",
            "--tcp",
            "--listening",
            "--numeric",
            "--no-header",
        ]
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
        sockets = [line.split()[3] for line in found.splitlines()]
        return {each for each in sockets if not re.match(r"127\.|\[::1\]|\[::ffff:127\.", each)}

    def used_bytes(self):
        """Bytes in each emptyDir now, by its path."""
        volumes = {each["name"]: each for each in self.template["spec"]["volumes"]}
        paths = [m["mountPath"] for m in self.container["volumeMounts"] if "emptyDir" in volumes[m["name"]]]
        usage = [os.statvfs(f"/proc/{self.pid}/root{path}") for path in paths]
        used = [each.f_frsize * (each.f_blocks - each.f_bfree) for each in usage]
        return dict(zip(paths, used, strict=True))

    def memory_bytes(self):
        """Memory of all its processes; pages that several share count once."""
        first = psutil.Process(self.pid)
        total = 0
        for each in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_full_info().pss
        return total

    def terminate(self):
        """What the kubelet does first: the preStop hook, of which there is none, then SIGTERM."""
        assert "preStop" not in self.container.get("lifecycle", {})
        os.kill(self.pid, 15)

    def wait_for_end(self):
        """The exit code; an error if the kubelet would have killed the container."""
        return self.process.wait(self.template["spec"]["terminationGracePeriodSeconds"])


def read_only(path, target=None):
    """Arguments of bwrap for a file or folder of this machine, at the same path or another one."""
    return ["--ro-bind", str(path), str(target or path)]


def folders_of(mounts):
    """Arguments of bwrap for the folders above; those that it makes by itself are for root alone."""
    targets = [Path(each) for each in mounts if each.startswith("/")]
    folders = {folder for target in targets for folder in target.parents if str(folder) != "/"}
    system = {Path("/usr"), Path("/sys"), Path("/proc"), Path("/dev")}
    made = sorted(each for each in folders if not system & {each, *each.parents})
    return [part for each in made for part in ("--perms", "0755", "--dir", str(each))]


def tmpfs(path, size, mode):
    """Arguments of bwrap for a folder that everybody may write, up to so many bytes."""
    return ["--perms", mode, "--size", str(size), "--tmpfs", path]


class Endpoints:
    """The Service: leads each new connection to the next of its pods."""

    def __init__(self, documents):
        self.port = only(documents, "Service")["spec"]["ports"][0]["targetPort"]
        self.pods = []
        self._turn = 0

    def url(self, path):
        """Where the next connection goes."""
        self._turn += 1
        pods = self.pods
        return pods[self._turn % len(pods)].url(self.port, path)

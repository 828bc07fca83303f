"""The management API of a running server, for the versions of one model. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from lib.cli import ScriptError, printable
from lib.server.local_http import direct_session

# Describing a model on a GPU host runs nvidia-smi once per worker, which takes seconds on some machines.
TIMEOUT_S = 60.0
READY = "READY"
# A worker answers this from its queue, like an image.
CARD_TIMEOUT_S = 60.0
# Asked for to learn whether the server registers archives: it answers 404, or 405 where it does not.
ABSENT_ARCHIVE = "no-such-archive.mar"


@dataclass(frozen=True)
class Worker:
    """A worker as the server describes it; pid is -1 before its process has started."""

    id: str
    pid: int
    status: str


@dataclass(frozen=True)
class ModelVersion:
    """A registered version.

    archive: what it was registered from, a file name of the model store.
    wanted_workers: how many the server keeps. pending: requests that no worker has taken yet.
    batch_timeout_s: the server ends a worker that takes longer for a batch.
    """

    version: str
    archive: str
    wanted_workers: int
    workers: tuple[Worker, ...]
    batch_size: int
    batch_timeout_s: float
    pending: int

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> ModelVersion:
        """Of the JSON object that the server describes a version with."""
        workers = (Worker(str(w["id"]), int(w["pid"]), str(w["status"])) for w in description["workers"])
        return cls(
            str(description["modelVersion"]),
            str(description["modelUrl"]),
            int(description["minWorkers"]),
            tuple(workers),
            int(description["batchSize"]),
            float(description["responseTimeout"]),
            int(description.get("jobQueueStatus", {}).get("pendingRequests", 0)),
        )

    @property
    def ready_pids(self) -> list[int]:
        """Process ids of the workers that have loaded the model."""
        return [worker.pid for worker in self.workers if worker.status == READY]

    def has_ready(self, count: int) -> bool:
        """Whether exactly this number of workers exists, all ready."""
        return len(self.workers) == len(self.ready_pids) == count


class Management:
    """The versions of one model of a running server.

    url: address of the management API. metrics_url: of the metrics.
    token: key of the management API, where the server asks for one.
    """

    def __init__(self, url: str, metrics_url: str, model_name: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.metrics_url = metrics_url.rstrip("/")
        self.model_name = model_name
        self._session = direct_session()
        if token is not None:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def versions(self) -> dict[str, ModelVersion]:
        """All registered versions, by version number.

        Raises:
            ScriptError: the model is not registered.
        """
        answer = self._call("GET", f"/models/{self.model_name}/all", accepted=(200, 404))
        if answer.status_code == 404:
            raise ScriptError(
                f"the server at {self.url} has no model {self.model_name!r}: {_message(answer)}; "
                "--model takes the name of a served one"
            )
        with _expected_form(self.url):
            found = map(ModelVersion.from_description, answer.json())
            return {each.version: each for each in found}

    def default_version(self) -> str:
        """The version that answers at the address without a version number."""
        answer = self._call("GET", f"/models/{self.model_name}")
        with _expected_form(self.url):
            return str(answer.json()[0]["modelVersion"])

    def version(self, version: str) -> ModelVersion:
        """One version.

        Raises:
            ScriptError: it is not registered.
        """
        answer = self._call("GET", f"/models/{self.model_name}/{version}")
        with _expected_form(self.url):
            return ModelVersion.from_description(answer.json()[0])

    def card(self, version: str, timeout_s: float = CARD_TIMEOUT_S) -> dict[str, Any]:
        """The model card, which one of the version's workers writes in its turn among the requests.

        Empty where the handler has none, or no worker answers within the time.
        """
        try:
            answer = self._session.get(
                f"{self.url}/models/{self.model_name}/{version}",
                params={"customized": "true"},
                timeout=timeout_s,
            )
            card = answer.json()[0].get("customizedMetadata") if answer.status_code == 200 else None
        except (requests.RequestException, ValueError, LookupError, AttributeError):
            return {}
        return card if isinstance(card, dict) else {}

    def pinned_requests(self, version: str) -> float:
        """How many requests named this version in their address so far; 0 where the server does not count.

        Raises:
            ScriptError: the server does not say.
        """
        try:
            page = self._session.get(f"{self.metrics_url}/metrics", timeout=TIMEOUT_S)
            families = list(text_string_to_metric_families(page.text)) if page.status_code == 200 else []
        except (requests.RequestException, ValueError) as error:
            raise ScriptError(f"{self.metrics_url}/metrics cannot be read: {error}") from error
        wanted = {"model_name": self.model_name, "model_version": version}
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "ts_inference_requests_total" and wanted.items() <= sample.labels.items()
        )

    def require_registration(self) -> None:
        """Check that the server registers archives.

        Raises:
            ScriptError: it does not; with the option that allows it.
        """
        answer = self._call("POST", "/models", params={"url": ABSENT_ARCHIVE}, accepted=(404, 405))
        if answer.status_code == 405:
            raise ScriptError(
                f"the server at {self.url} does not register archives (its model API is off), which this "
                "command needs; start it with `python scripts/serve.py --enable-model-api`, or set "
                "enable_model_api=true in its config.properties"
            )

    def register(self, archive: str) -> None:
        """Register an archive of the model store; its workers start afterwards.

        Raises:
            ScriptError: the server refuses it.
        """
        # Waiting in this call would block a thread of the server that serves other connections.
        self._call(
            "POST",
            "/models",
            params={"url": archive, "synchronous": "false"},
            hint=f"; --model-store has to be the server's model store, in which {archive} was put",
        )

    def scale(self, version: str, workers: int) -> None:
        """Ask for a number of workers; they start and end afterwards."""
        bounds = {"min_worker": str(workers), "max_worker": str(workers), "synchronous": "false"}
        self._call("PUT", f"/models/{self.model_name}/{version}", params=bounds)

    def set_default(self, version: str) -> None:
        """Let this version answer at the address without a version number, from the next request on."""
        self._call("PUT", f"/models/{self.model_name}/{version}/set-default")

    def unregister(self, version: str) -> None:
        """Remove a version that has no workers and no requests; otherwise the server may never answer."""
        self._call("DELETE", f"/models/{self.model_name}/{version}")

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        accepted: tuple[int, ...] = (200, 202),
        hint: str = "",
    ) -> requests.Response:
        """An answer with an accepted status.

        Raises:
            ScriptError: there is none; with the server's reason and the hint.
        """
        try:
            answer = self._session.request(
                method, self.url + path, params=params, timeout=TIMEOUT_S, allow_redirects=False
            )
        except requests.RequestException as error:
            raise ScriptError(
                f"no answer from the management API at {self.url}: {error}; --management-url names another"
            ) from error
        if answer.status_code not in accepted:
            raise ScriptError(
                f"the server answers {answer.status_code} to {method} {path}: {_message(answer)}{hint}"
            )
        return answer


def _message(answer: requests.Response) -> str:
    try:
        return printable(str(answer.json()["message"]))
    except (ValueError, LookupError, TypeError):
        return printable(answer.text[:200])


@contextlib.contextmanager
def _expected_form(url: str) -> Iterator[None]:
    """Turn the errors of reading an answer of another form into one that says so.

    Raises:
        ScriptError: the answer is not that of TorchServe's management API.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ScriptError(
            f"what {url} answers is not TorchServe's management API: {error!r}; --management-url names "
            "another"
        ) from error


def read_key_file(path: Path) -> tuple[str, str]:
    """The management and the inference key of the key_file.json that TorchServe writes.

    Raises:
        ScriptError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        return str(content["management"]["key"]), str(content["inference"]["key"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ScriptError(f"{path} is no key_file.json of TorchServe: {error!r}") from error

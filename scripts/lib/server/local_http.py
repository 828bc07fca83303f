"""HTTP to a server that is named by its address: never through a proxy of the environment."""

from __future__ import annotations

import contextlib

import requests


def direct_session() -> requests.Session:
    """A session that ignores `http_proxy`, `https_proxy`, `ALL_PROXY` and ~/.netrc.

    A proxy cannot reach 127.0.0.1 of this machine; a call through one hangs or gets the proxy's answer.
    """
    session = requests.Session()
    session.trust_env = False
    return session


def answers_ok(url: str, timeout_s: float = 5.0) -> bool:
    """Whether a GET is answered with status 200; False also where nobody listens."""
    with contextlib.suppress(requests.RequestException), direct_session() as session:
        return session.get(url, timeout=timeout_s).status_code == 200
    return False

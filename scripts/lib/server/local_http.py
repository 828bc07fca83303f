"""HTTP to a server that is named by its address: never through a proxy of the environment."""

from __future__ import annotations

import requests


def direct_session() -> requests.Session:
    """A session that ignores `http_proxy`, `https_proxy`, `ALL_PROXY` and ~/.netrc.

    A proxy cannot reach 127.0.0.1 of this machine; a call through one hangs or gets the proxy's answer.
    """
    session = requests.Session()
    session.trust_env = False
    return session

"""Fetch pictures from the web, within limits on size, time, and redirects."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from importlib.metadata import version
from typing import Any

from imprompt._connection import is_local
from imprompt._errors import invalid

SCHEMES = ("http://", "https://")
MAX_BYTES = 64 * 2**20
"""Maximum size of a file. A photo has a few megabytes."""
TIMEOUT_S = 30.0
"""Maximum duration of a download, and of each wait for the server."""
MAX_REDIRECTS = 5
_CHUNK_BYTES = 64 * 1024
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"
"""Characters of a URL to keep as they are; others, such as spaces, are quoted."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS


def download(url: str, parameter: str) -> bytes:
    """Fetch the file at a web address.

    Raises:
        InvalidRequest: the server does not answer with a file, or it is too large or too slow.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        shown, has_password, host = f"{parts.scheme}://{parts.hostname}{parts.path}", "@" in parts.netloc, parts.netloc
    except ValueError as error:
        raise invalid(parameter, f"not a valid URL: {error}") from None
    if has_password:
        raise invalid(parameter, f"a URL must not contain a user name or password ({shown})")
    try:
        return _fetch(url, host, shown, parameter)
    except urllib.error.HTTPError as error:
        with error:
            reason = "too many redirects" if "infinite loop" in str(error.msg) else f"HTTP {error.code} {error.reason}"
    except urllib.error.URLError as error:
        reason = str(getattr(error.reason, "strerror", None) or error.reason)
    except TimeoutError:
        reason = f"not done after {TIMEOUT_S:g} s"
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, ValueError) and hasattr(error, "parameter"):
            raise
        reason = f"{type(error).__name__}: {error}"
    # The query is left out: it may hold a signature.
    raise invalid(parameter, f"cannot fetch {shown}: {reason}") from None


def _fetch(url: str, host: str, shown: str, parameter: str) -> bytes:
    ends = time.monotonic() + TIMEOUT_S
    headers = {"User-Agent": f"imprompt/{version('imprompt')}", "Accept": "image/*"}
    request = urllib.request.Request(urllib.parse.quote(url, safe=_URL_CHARACTERS), headers=headers)
    with _opener(host).open(request, timeout=TIMEOUT_S) as response:
        declared = response.headers.get("Content-Length", "")
        length, data = int(declared) if declared.isdecimal() else None, bytearray()
        while max(length or 0, len(data)) <= MAX_BYTES:
            chunk = response.read1(_CHUNK_BYTES)
            if not chunk and length in (None, len(data)):
                return bytes(data)
            if not chunk:
                raise http.client.IncompleteRead(bytes(data), (length or 0) - len(data))
            if time.monotonic() > ends:
                raise TimeoutError
            data += chunk
    raise invalid(parameter, f"{shown} is larger than {MAX_BYTES // 2**20} MiB")


def _opener(host: str) -> Any:
    """Return an opener for web addresses only: not for files or FTP, to which a server could redirect."""
    opener = urllib.request.OpenerDirector()
    # A proxy cannot reach this machine under a loopback name.
    proxies = urllib.request.ProxyHandler({} if is_local(host if ":" in host else f"{host}:") else None)
    for handler in (
        proxies,
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener

"""TLS, tokens, and the environment variables for both."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_triton import FakeTriton, refuse, running

from imprompt import AsyncClient, Client, ConnectionFailed, InvalidRequest

KINDS = pytest.mark.parametrize("kind", [Client, AsyncClient])


@dataclass(frozen=True)
class Certificates:
    """A certificate authority, and what it issued for a server on the loopback address and for a client."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    def server(self, *, client_certificate: bool) -> grpc.ServerCredentials:
        key, chain, root = (self.path(name).read_bytes() for name in ("server.key", "server.pem", "root.pem"))
        return grpc.ssl_server_credentials([(key, chain)], root, require_client_auth=client_certificate)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, to make certificates")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-x509", "-nodes", "-days", "30", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    for root in ("root", "other"):
        openssl(*new, "-keyout", f"{root}.key", "-out", f"{root}.pem", "-subj", f"/CN={root}")
    for name in ("server", "client"):
        issued = ("-CA", "root.pem", "-CAkey", "root.key", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        openssl(*new, *issued, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    return Certificates(folder)


@pytest.fixture
def tls_url(triton: FakeTriton, certificates: Certificates) -> Iterator[str]:
    with running(triton, certificates.server(client_certificate=False)) as address:
        yield address


@pytest.fixture
def mutual_tls_url(triton: FakeTriton, certificates: Certificates) -> Iterator[str]:
    with running(triton, certificates.server(client_certificate=True)) as address:
        yield address


def test_server_certificate_is_checked(tls_url: str, connect: Callable[..., Any], certificates: Certificates) -> None:
    root, other = certificates.path("root.pem"), certificates.path("other.pem")
    assert connect(tls_url, root_certificates=root).generate(model="one", prompt="a").images
    assert connect(f"grpcs://{tls_url}", root_certificates=root.read_bytes()).models() == ["none", "one", "two"]
    with pytest.raises(ConnectionFailed, match="CERTIFICATE_VERIFY_FAILED"):
        connect(tls_url, root_certificates=str(other)).models()
    with pytest.raises(ConnectionFailed, match="CERTIFICATE_VERIFY_FAILED"):  # the well-known authorities
        connect(f"grpcs://{tls_url}").models()


def test_error_without_tls_suggests_it(tls_url: str, connect: Callable[..., Any]) -> None:
    with pytest.raises(ConnectionFailed, match="grpcs://host:port with TLS"):
        connect(tls_url).models()


def test_client_identifies_itself(mutual_tls_url: str, connect: Callable[..., Any], certificates: Certificates) -> None:
    root = certificates.path("root.pem")
    with pytest.raises(ConnectionFailed):
        connect(mutual_tls_url, root_certificates=root).models()
    identity = {"client_certificate": certificates.path("client.pem"), "client_key": certificates.path("client.key")}
    client = connect(mutual_tls_url, root_certificates=root, **identity)
    assert client.generate(model="one", prompt="a").images


@KINDS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root_certificates": "nowhere.pem"}, "root_certificates: cannot read 'nowhere.pem': No such file"),
        ({"root_certificates": b"secret"}, "root_certificates: must be a PEM file"),
        ({"root_certificates": __file__}, "root_certificates: must be a PEM file"),
        ({"root_certificates": 5}, "root_certificates: must be a PEM file"),
        ({"client_certificate": "a.pem"}, "client_certificate: needs a client_key"),
        ({"client_key": "a.pem"}, "client_key: needs a client_certificate"),
        ({"token": "secret token"}, "token: must be printable ASCII without spaces"),
        ({"token": "secret\n"}, "token: must be printable ASCII without spaces"),
        ({"token": b"secret"}, "token: must be printable ASCII without spaces"),
        ({"token": "a", "metadata": {"Authorization": "secret"}}, "token: metadata already has authorization"),
        (
            {"credentials": grpc.ssl_channel_credentials(), "root_certificates": "a"},
            "credentials: cannot be combined with root_certificates",
        ),
    ],
)
def test_invalid_options(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        kind("localhost", **options)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)
    assert caught.value.parameter in options


def test_token_is_sent_with_every_call(
    url: str, triton: FakeTriton, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPROMPT_TOKEN", "of-the-environment")
    connect().generate(model="one", prompt="a")
    list(connect(token="given", metadata={"x-team": "b"}).stream(model="one", prompt="a"))
    sent = [call.metadata for call in triton.calls]
    assert [metadata["authorization"] for metadata in sent] == ["Bearer of-the-environment", "Bearer given"]
    assert sent[1]["x-team"] == "b"
    monkeypatch.setenv("IMPROMPT_TOKEN", "")
    connect().generate(model="one", prompt="a")
    assert "authorization" not in triton.calls[-1].metadata


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_refused_token(triton: FakeTriton, connect: Callable[..., Any], status: grpc.StatusCode) -> None:
    triton.answer = refuse(status, "Jwt is expired")
    with pytest.raises(ConnectionFailed, match=rf"the server refuses the call \({status.name}\): Jwt is expired"):
        connect(token="a").generate(model="one", prompt="a")
    triton.answer = refuse(status, "")
    with pytest.raises(ConnectionFailed, match="check the token"):
        list(connect(token="a").stream(model="one", prompt="a"))


def test_address_from_the_environment(url: str, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPROMPT_URL", url)
    assert connect(None).models() == ["none", "one", "two"]
    monkeypatch.setenv("IMPROMPT_URL", "http://localhost:8000")
    with pytest.raises(InvalidRequest, match="url: must be the host:port"):
        connect(None)

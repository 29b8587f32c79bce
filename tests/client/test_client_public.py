"""The public interface of the client package."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import imprompt
from imprompt import AsyncClient, Client


def test_public_names() -> None:
    assert imprompt.__all__ == [
        "AsyncClient",
        "Cancelled",
        "Capabilities",
        "Client",
        "ConnectionFailed",
        "DeadlineExceeded",
        "ImageInput",
        "ImpromptError",
        "InvalidRequest",
        "Overloaded",
        "Progress",
        "Result",
        "ServerError",
        "__version__",
    ]
    assert all(hasattr(imprompt, name) for name in imprompt.__all__)


def test_package_is_marked_as_typed() -> None:
    assert Path(imprompt.__file__).with_name("py.typed").exists()


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(m).parameters) for name, m in found if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)


def test_client_does_not_import_the_other_packages() -> None:
    heavy = ("torch", "diffusers", "onnx", "imprompt_serving", "imprompt_export", "matplotlib")
    script = f"import sys, imprompt, imprompt.cli; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"

"""How options of `imprompt generate` become request parameters. `parameter_options` lists the options."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
import typer

from imprompt import Client
from imprompt._connection import DEFAULT_URL, TOKEN_VARIABLE, URL_VARIABLE
from imprompt._errors import invalid, short_repr
from imprompt.cli import console

Kind: TypeAlias = Literal[
    "text", "texts", "integer", "integers", "pair", "number", "numbers", "flag", "json", "scales", "file", "pictures",
    "adapter pictures", "embeds",
]  # fmt: skip
"""What an option reads; plural kinds may be repeated. `scales` are `NAME=SCALE`; `adapter pictures` and `embeds` are
files, each of which may be preceded by the name of its adapter."""

Command = TypeVar("Command", bound=Callable[..., Any])

_ADAPTER_AND_FILE = re.compile(r"(?P<adapter>[a-z][a-z0-9_-]*)=(?P<file>.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """An option that is named after its request parameter."""

    name: str
    kind: Kind
    help: str
    choices: tuple[str, ...] = ()
    """Values that shells complete; the server decides which ones it takes."""
    aliases: tuple[str, ...] = ()
    variable: str | None = None
    """Environment variable that replaces the option."""
    panel: str = "Request"
    """Group of options in the help."""

    @property
    def flags(self) -> tuple[str, ...]:
        """The option as it is written, such as `--guidance-scale`."""
        return (f"--{self.name.replace('_', '-')}", *self.aliases)

    def parameter(self) -> inspect.Parameter:
        """Return the parameter of a command function, for typer."""
        python_type, settings = _TYPES[self.kind]
        if self.choices:
            settings = {**settings, "autocompletion": lambda: list(self.choices)}
        option = typer.Option(*self.flags, help=self.help, envvar=self.variable, rich_help_panel=self.panel, **settings)
        annotation = Annotated[python_type | None, option]  # type: ignore[valid-type]  # computed
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise typer.BadParameter("the JSON is nested too deeply") from None
    except ValueError as error:
        raise typer.BadParameter(f"invalid JSON: {error}") from None


def _scale(text: str) -> tuple[str, float]:
    name, _, scale = text.partition("=")
    try:
        return name, float(scale)
    except ValueError:
        raise typer.BadParameter(f"must be NAME=SCALE, got {short_repr(text)}") from None


_TYPES: dict[Kind, tuple[Any, dict[str, Any]]] = {
    "text": (str, {}),
    "texts": (list[str], {}),
    "integer": (int, {}),
    "integers": (list[int], {}),
    "pair": (tuple[int, int], {}),
    "number": (float, {}),
    "numbers": (list[float], {}),
    "flag": (bool, {}),
    "json": (Any, {"parser": _json, "metavar": "JSON"}),
    "scales": (list[Any], {"parser": _scale, "metavar": "NAME=SCALE"}),
    "file": (str, {"metavar": "FILE"}),
    "pictures": (list[str], {"metavar": "FILE"}),
    "adapter pictures": (list[str], {"metavar": "[NAME=]FILE"}),
    "embeds": (list[str], {"metavar": "[NAME=]FILE"}),
}
"""Python type and typer settings of each kind."""


def with_options(options: Iterable[Option]) -> Callable[[Command], Command]:
    """Replace the `**parameters` of a command function by these options, for typer."""

    def declare(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        declared = [*own, *(option.parameter() for option in options)]
        command.__signature__ = signature.replace(parameters=declared)  # type: ignore[attr-defined]
        return command

    return declare


def given(options: Iterable[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that the options on the command line stand for."""
    found = {}
    for option in options:
        value = values.get(option.name)
        if value in (None, [], ()):
            continue
        match option.kind:
            case "scales":
                value = dict(value)
            case "pictures":
                value = value[0] if len(value) == 1 else value  # a single file may be a clip
            case "adapter pictures":
                value = _by_adapter(option, value)
            case "embeds":
                value = _load_embeds(option, _by_adapter(option, value))
        found[option.name] = value
    return found


def only_bundle(client: Client) -> str:
    """Return the served bundle; fail if there are several."""
    served = client.models()
    if len(served) != 1:
        console.fail(f"--model: name one of the served bundles: {', '.join(served) or 'there are none'}", status=2)
    return served[0]


def _by_adapter(option: Option, values: list[str]) -> list[str] | dict[str, list[str]]:
    """Return `NAME=FILE` options as a dict keyed by adapter name, and plain `FILE` options as a list."""
    named = [None if os.path.exists(value) else _ADAPTER_AND_FILE.fullmatch(value) for value in values]
    if not any(named):
        return values
    files: dict[str, list[str]] = {}
    for match in named:
        if match is None:
            console.fail(f"{option.flags[0]}: use NAME=FILE for all of them or for none", status=2)
        files.setdefault(match["adapter"], []).append(match["file"])
    return files


def _load_embeds(option: Option, files: list[str] | dict[str, list[str]]) -> Any:
    """Read the embeddings of each adapter; several files of one adapter are joined."""
    if isinstance(files, dict):
        return {name: np.concatenate([_array(option, file) for file in group], axis=1) for name, group in files.items()}
    return [_array(option, file) for file in files]


def _array(option: Option, file: str) -> np.ndarray[Any, Any]:
    try:
        array = np.load(file)
    except OSError as error:
        raise invalid(option.name, f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, EOFError):
        array = None
    if not isinstance(array, np.ndarray) or array.ndim < 2:
        raise invalid(option.name, f"{file} is not a .npy file as `imprompt encode` writes it")
    return array


def _connection(name: str, kind: Kind, help: str, variable: str | None = None) -> Option:
    return Option(name=name, kind=kind, help=help, variable=variable, panel="Connection")


CONNECTION = (
    _connection(
        "url",
        "text",
        f"gRPC address of the server: host:port, or grpcs://host:port with TLS (default: {DEFAULT_URL}).",
        URL_VARIABLE,
    ),
    _connection("token", "text", "Bearer token to send with every call.", TOKEN_VARIABLE),
    _connection("root_certificates", "file", "PEM file with the certificates to trust; turns on TLS."),
    _connection("client_certificate", "file", "PEM file with this client's certificate, for mutual TLS."),
    _connection("client_key", "file", "PEM file with the private key of --client-certificate."),
)
"""The options of every command that calls a server. They are named after the arguments of `Client`."""

"""The parameters as the Python client spells them out: `python -m imprompt_serving.signatures client/imprompt`.

Writes the keyword arguments of `generate` and `stream` and their documentation, the types of choices, and the options
of `imprompt generate` into the sources of the client, so that editors complete them. The client itself imports nothing
of this package.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from imprompt_serving.parameters import ROWS, Group, Parameter, Type

_PYTHON = {
    Type.TEXT: "str",
    Type.TEXTS: "str | Sequence[str]",
    Type.INTEGER: "int",
    Type.PAIR: "Sequence[int]",
    Type.SEEDS: "int | Sequence[int]",
    Type.NUMBER: "float",
    Type.NUMBERS: "float | Sequence[float]",
    Type.FLAG: "bool",
    Type.OBJECT: "Mapping[str, Any]",
    Type.PICTURES: "Images",
}
_OPTION = {
    Type.TEXT: "str",
    Type.TEXTS: "list[str]",
    Type.CHOICE: "str",
    Type.CHOICES: "list[str]",
    Type.INTEGER: "int",
    Type.SEEDS: "list[int]",
    Type.NUMBER: "float",
    Type.NUMBERS: "list[float]",
    Type.FLAG: "bool",
    Type.PICTURES: "list[Path]",
}
_WIDTH = 120
_KEYWORDS = tuple(row for row in ROWS if row.sdk)
_COMMON = tuple(row for row in _KEYWORDS if row.group is not Group.STREAM)


def python_type(row: Parameter) -> str:
    """Type of a keyword argument, without the None that stands for not given."""
    if row.literal is not None:
        return f"{row.literal} | Sequence[{row.literal}]" if row.type is Type.CHOICES else row.literal
    return row.python or _PYTHON[row.type]


def summary(row: Parameter) -> str:
    """What a Python caller reads about a parameter."""
    return row.doc + row.range_and_default if row.python_doc is None else row.python_doc


def _arguments(rows: Iterable[Parameter]) -> str:
    return "".join(f"        {row.name}: {python_type(row)} | None = None,\n" for row in rows)


def _docstring(rows: Iterable[Parameter]) -> str:
    indent = " " * 12
    lines = (f"{row.name}: {summary(row)}." for row in rows)
    return "".join(
        textwrap.fill(
            line,
            _WIDTH,
            initial_indent=indent,
            subsequent_indent=indent + " " * 4,
            break_long_words=False,
            break_on_hyphens=False,
        )
        + "\n"
        for line in lines
    )


def _types() -> str:
    literals = {row.literal: row.choices for row in ROWS if row.literal is not None}
    lines = [f"{name}: TypeAlias = Literal[\n{_items(choices)}]\n" for name, choices in literals.items()]
    return "".join([*lines, f"NAMES = (\n{_items(tuple(row.name for row in _KEYWORDS))})\n"])


def _items(texts: tuple[str, ...]) -> str:
    return "".join(f'    "{text}",\n' for text in texts)


def _options() -> str:
    return "".join(map(_option, (row for row in ROWS if row.option)))


def _option(row: Parameter) -> str:
    text = (row.doc + row.range_and_default).replace("`", "")
    indent = " " * 12
    lines = textwrap.wrap(f"{text[0].upper()}{text[1:]}.", _WIDTH - 20, drop_whitespace=False, break_on_hyphens=False)
    help = f"\n{indent}".join(f'"{line}"' for line in lines)
    if row.type is Type.OBJECT:
        kind, option = "Any", f"_json_option(\n{indent}{help},\n        )"
    else:
        names = row.option_names or (("--" + row.name.replace("_", "-"),) if row.type is Type.FLAG else ())
        declared = "".join(f'{indent}"{name}",\n' for name in names)
        kind, option = f"{_OPTION[row.type]} | None", f"typer.Option(\n{declared}{indent}help={help},\n        )"
    return f"    {row.name}: Annotated[\n        {kind},\n        {option},\n    ] = None,\n"


_BLOCKS: dict[str, Callable[[], str]] = {
    "arguments of generate": lambda: _arguments(_COMMON),
    "arguments of stream": lambda: _arguments(_KEYWORDS),
    "types": _types,
    "options": _options,
}
_BLOCK = re.compile(
    r"^(?P<start>(?P<indent> *)# Made by imprompt_serving\.signatures: (?P<name>[a-z ]+)\n).*?"
    r"(?P<end>^(?P=indent)# End\n)",
    re.DOTALL | re.MULTILINE,
)
_DOCUMENTED = {
    "prompt: what to show; a list makes one picture (or more) of each.": _COMMON,
    "others: as for `generate`.": tuple(row for row in _KEYWORDS if row.group is Group.STREAM),
}
"""Lines of docstrings after which those of these parameters follow, up to an empty line."""


def filled(source: str) -> str:
    """`source` with each of its blocks made anew."""
    source = _BLOCK.sub(lambda block: block["start"] + _BLOCKS[block["name"]]() + block["end"], source)
    for line, rows in _DOCUMENTED.items():
        found = re.compile(rf"^( {{12}}{re.escape(line)}\n).*?(?=^\n)", re.DOTALL | re.MULTILINE)
        source = found.sub(lambda block, rows=rows: block[1] + _docstring(rows), source)  # type: ignore[misc]
    return source


FILES = ("_async_client.py", "_client.py", "_parameters.py", "cli.py")

if __name__ == "__main__":
    for name in FILES:
        path = Path(sys.argv[1]) / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

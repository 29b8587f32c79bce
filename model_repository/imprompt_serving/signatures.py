"""Write the request parameters into the Python client: `python -m imprompt_serving.signatures client/imprompt`.

Generates the keyword arguments of `generate` and `stream` with their documentation, the `Literal` types of choices, and
the options of `imprompt generate` into the client's sources, so that editors can complete them. The client itself
imports nothing from this package.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from imprompt_serving.parameters import PARAMETERS, ROWS, Group, Parameter, Type

_PYTHON = {
    Type.TEXT: "str",
    Type.TEXTS: "str | Sequence[str]",
    Type.INTEGER: "int",
    Type.INTEGERS: "int | Sequence[int]",
    Type.PAIR: "Sequence[int]",
    Type.SEEDS: "int | Sequence[int]",
    Type.NUMBER: "float",
    Type.NUMBERS: "float | Sequence[float]",
    Type.FLAG: "bool",
    Type.OBJECT: "Mapping[str, Any]",
    Type.PICTURES: "Images",
    Type.TENSOR: "Embeds",
}
_OPTION_KINDS = {
    Type.TEXT: "text",
    Type.TEXTS: "texts",
    Type.CHOICE: "text",
    Type.CHOICES: "texts",
    Type.INTEGER: "integer",
    Type.INTEGERS: "integers",
    Type.PAIR: "pair",
    Type.SEEDS: "integers",
    Type.NUMBER: "number",
    Type.NUMBERS: "numbers",
    Type.FLAG: "flag",
    Type.OBJECT: "json",
    Type.PICTURES: "pictures",
    Type.EMBEDS: "embeds",
}
"""Kinds of options (`imprompt.cli.options.Kind`); `_option_kind` has the exceptions."""
_WIDTH = 120
_KEYWORDS = tuple(row for row in ROWS if row.sdk)
_COMMON = tuple(row for row in _KEYWORDS if row.group is not Group.STREAM)
OPTIONS = tuple(row for row in _KEYWORDS if row.name != "preview" and row.type is not Type.TENSOR)
"""The rows with a generated option. Tensors have none, and `imprompt generate` declares `--preview` itself: it takes
the file to write."""


def python_type(row: Parameter) -> str:
    """Return the type annotation of a keyword argument, without `| None`."""
    if row.literal is not None:
        return f"{row.literal} | Sequence[{row.literal}]" if row.type is Type.CHOICES else row.literal
    return row.python or _PYTHON[row.type]


def summary(row: Parameter) -> str:
    """Return the documentation of a keyword argument."""
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
    pictures = [row for row in _KEYWORDS if row.type is Type.PICTURES and not _has_adapter(row)]
    groups = {
        "NAMES": _KEYWORDS,
        "PICTURES": pictures,
        "OBJECTS": [row for row in _KEYWORDS if row.type is Type.OBJECT],
    }
    lines += [f"{name} = {_tuple([row.name for row in rows])}\n" for name, rows in groups.items()]
    return "".join(lines)


def _items(texts: Iterable[str]) -> str:
    return "".join(f'    "{text}",\n' for text in texts)


def _tuple(texts: Sequence[str]) -> str:
    return f'("{texts[0]}",)' if len(texts) == 1 else f"(\n{_items(texts)})"


def _has_adapter(row: Parameter) -> bool:
    """Return whether each picture of the parameter belongs to an adapter."""
    return f"{row.name}_adapter" in PARAMETERS


def _options() -> str:
    return "".join(map(_option, OPTIONS))


def _option(row: Parameter) -> str:
    text = _MENTION.sub(_in_words_of_the_command, row.option_doc or row.doc + row.range_and_default)
    fields = {"name": row.name, "kind": _option_kind(row)}
    lines = [f'        {name}="{value}",\n' for name, value in fields.items()]
    lines.append(f"        help={_wrapped(f'{text[0].upper()}{text[1:]}.')},\n")
    if row.choices:
        lines.append(f"        choices=get_args({row.literal or row.python}),\n")
    if row.option_names:
        lines.append(f"        aliases=({', '.join(f'{chr(34)}{name}{chr(34)}' for name in row.option_names)},),\n")
    return "    Option(\n" + "".join(lines) + "    ),\n"


def _option_kind(row: Parameter) -> str:
    match row.type:
        case Type.PICTURES if _has_adapter(row):
            return "adapter pictures"
        case Type.OBJECT if row.python == "Mapping[str, float]":
            return "scales"
        case Type.NUMBERS if row.python is not None:  # more than numbers
            return "json"
        case _:
            return _OPTION_KINDS[row.type]


_MENTION = re.compile(r"`([^`]+)`")


def _in_words_of_the_command(mention: re.Match[str]) -> str:
    known = mention[1] in PARAMETERS
    return f"--{mention[1].replace('_', '-')}" if known else mention[1]


def _wrapped(text: str) -> str:
    """Return `text` as the value of an argument, on several lines if it does not fit on one."""
    if len(text) <= _WIDTH - len('        help="",'):
        return f'"{text}"'
    lines = textwrap.wrap(text, _WIDTH - 20, drop_whitespace=False, break_on_hyphens=False)
    return "(\n" + "".join(f'            "{line}"\n' for line in lines) + "        )"


_BLOCKS: dict[str, Callable[[], str]] = {
    "arguments of generate": lambda: _arguments(_COMMON),
    "arguments of stream": lambda: _arguments(_KEYWORDS),
    "types": _types,
    "options": _options,
}
_BLOCK = re.compile(
    r"^(?P<start>(?P<indent> *)# Generated by imprompt_serving\.signatures: (?P<name>[a-z ]+)\n).*?"
    r"(?P<end>^(?P=indent)# End\n)",
    re.DOTALL | re.MULTILINE,
)
_DOCUMENTED = {
    "prompt: what to draw; a list of prompts produces one picture (or more) each.": _COMMON,
    "others: as for `generate`.": tuple(row for row in _KEYWORDS if row.group is Group.STREAM),
}
"""Docstring lines that precede generated ones, and the parameters documented there; the block ends at an empty line."""


def filled(source: str) -> str:
    """Return `source` with all generated blocks up to date."""
    source = _BLOCK.sub(lambda block: block["start"] + _BLOCKS[block["name"]]() + block["end"], source)
    for line, rows in _DOCUMENTED.items():
        found = re.compile(rf"^( {{12}}{re.escape(line)}\n).*?(?=^\n)", re.DOTALL | re.MULTILINE)
        source = found.sub(lambda block, rows=rows: block[1] + _docstring(rows), source)  # type: ignore[misc]
    return source


FILES = ("_async_client.py", "_client.py", "_parameters.py", "cli/parameter_options.py")

if __name__ == "__main__":
    for name in FILES:
        path = Path(sys.argv[1]) / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

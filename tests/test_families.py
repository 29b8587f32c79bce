"""Model families are complete, light to import, and no code outside their modules depends on their names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from imprompt_export.families import ExportFamily, export_family
from imprompt_serving.families import NAMES, Family, get_family
from test_packaging import ROOMS, ROOT, loaded_by, modules, within

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime")
CHOOSING = {f"benchmarks/imprompt_bench/{name}.py" for name in ("presets", "rig", "overhead", "checkpoints")}
"""Modules that choose the family to measure, and write checkpoints for it."""
_OF_ONE_FAMILY = re.compile(r"(?i)(^|_)(xl|sd15|sdxl)(_|$)")


@pytest.mark.parametrize("name", NAMES)
def test_family_exists_in_export_and_server(name: str) -> None:
    served, exported = get_family(name), export_family(name)
    assert isinstance(served, Family)
    assert isinstance(exported, ExportFamily)
    assert exported.name == name
    assert len(exported.text_encoders) == len(served.prompts)


@pytest.mark.parametrize("room", ["imprompt_serving", "imprompt_export"])
def test_importing_a_family_loads_nothing_heavy(room: str) -> None:
    loaded = loaded_by(*(f"{room}.families.{name}" for name in NAMES))
    assert not {name for name in loaded if within(name, HEAVY)}


def test_no_other_code_depends_on_the_name_of_a_family() -> None:
    """Code asks the family object for everything that differs between families."""
    files = [file for room in ROOMS for file in modules(room) if file.parent.name != "families"]
    files = [file for file in files if file.relative_to(ROOT).as_posix() not in CHOOSING]
    assert not [f"{file.relative_to(ROOT)}:{line}" for file in files for line in _asking(file.read_text())]


@pytest.mark.parametrize(
    "line",
    [
        'x = 1 if family == "sdxl" else 2',
        "xl = bundle.pooled_size",
        'f(sd15="a")',
        "is_xl(1)",
        "case = a.xl",
        'x["sd15"]',
    ],
)
def test_search_finds_names_of_families(line: str) -> None:
    assert list(_asking(line)) == [1]


def _asking(source: str) -> Iterator[int]:
    """Yield the lines with the name of a family as a string, or with an identifier that stands for one."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(value)) if value in NAMES:
                yield node.lineno
            case ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.Attribute(attr=name):
                if _OF_ONE_FAMILY.search(name):
                    yield node.lineno

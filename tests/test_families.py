"""Model families: each is there in both rooms, light, and told from the others by nothing but its own modules."""

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
"""They say which family is measured, and write checkpoints for it."""
_OF_ONE_FAMILY = re.compile(r"(?i)(^|_)(xl|sd15|sdxl)(_|$)")


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_there_in_both_rooms(name: str) -> None:
    served, exported = get_family(name), export_family(name)
    assert isinstance(served, Family)
    assert isinstance(exported, ExportFamily)
    assert exported.name == name
    assert len(exported.text_encoders) == len(served.prompts)


@pytest.mark.parametrize("room", ["imprompt_serving", "imprompt_export"])
def test_asking_a_family_loads_nothing_heavy(room: str) -> None:
    loaded = loaded_by(*(f"{room}.families.{name}" for name in NAMES))
    assert not {name for name in loaded if within(name, HEAVY)}


def test_nothing_else_asks_for_a_family() -> None:
    """What differs between families is asked of the family."""
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
def test_the_search_finds(line: str) -> None:
    assert list(_asking(line)) == [1]


def _asking(source: str) -> Iterator[int]:
    """Lines that have the name of a family as a value, or a name in code that stands for one."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(value)) if value in NAMES:
                yield node.lineno
            case ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.Attribute(attr=name):
                if _OF_ONE_FAMILY.search(name):
                    yield node.lineno

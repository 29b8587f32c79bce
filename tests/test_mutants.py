"""The tool that changes the code to see whether tests notice: which changes it makes, and which tests it runs."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CODE = '''
LIMIT = 3

def f(x: int = 0, *, strict: bool = False) -> int:
    """Sum."""
    logger.info("x %d", 1)
    assert x > 0
    g(x)
    return x + 1 if not x <= 2 and strict else -x

pairs = list(zip([], [], strict=True))
'''


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


def test_each_mutant_changes_one_place(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    found = tool.mutants("code.py")
    changes = Counter((mutant.before, mutant.after) for mutant in found)
    assert changes == Counter(
        {
            ("0", "1"): 1,
            ("False", "True"): 1,
            ("g(x)", "pass"): 1,
            ("x + 1 if not x <= 2 and strict else -x", "-x if not x <= 2 and strict else x + 1"): 1,
            ("not x <= 2 and strict", "not x <= 2 or strict"): 1,
            ("not x <= 2", "x <= 2"): 1,
            ("x <= 2", "x < 2"): 1,
            ("2", "3"): 1,
            ("x + 1", "x - 1"): 1,
            ("1", "2"): 1,
            ("-x", "x"): 1,
        }
    )
    assert len({mutant.source() for mutant in found}) == len(found)


def test_every_module_with_behavior_has_tests(tool: ModuleType) -> None:
    without_behavior = {"__init__.py", "__main__.py", "meter.py", "precision.py", "protocol.py", "_parameters.py"}
    modules = [
        path.relative_to(ROOT).as_posix()
        for folder in ("model_repository/imprompt_serving/denoiser", "client/imprompt")
        for path in (ROOT / folder).glob("*.py")
        if path.name not in without_behavior
    ]
    assert sorted(modules) == sorted(path for path in tool.TESTS if not path.endswith("pipeline/request.py"))
    assert all((ROOT / "tests" / test).is_file() for tests in tool.TESTS.values() for test in tests)

"""Find code that no fast test checks: change it in small ways, one at a time, and see whether a test fails.

Run `make mutants`, or `python tools/mutants.py --count 40 --seed 0 denoiser/policy.py`. A mutant is a copy of the
repository with one change, such as `<` instead of `<=`. The tool runs the in-process tests of the changed module and
reports each mutant that they do not notice. It never changes the working tree.
"""

from __future__ import annotations

import argparse
import ast
import copy
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SERVING, CLIENT = "model_repository/imprompt_serving", "client/imprompt"
FOLDERS = ("client", "export", "model_repository")
"""Import roots, besides `tests`."""
_SDK = {
    "_async_client": "calls",
    "_client": "calls",
    "_connection": "connection",
    "_download": "urls",
    "_errors": "errors",
    "_image_prompts": "image_prompts",
    "_images": "request",
    "_model": "request",
    "_notebook": "show",
    "_output_files": "result",
    "_picture_files": "request",
    "_provenance": "show",
    "_request": "request",
    "_result": "result",
    "_retry": "retries",
    "_tensors": "request",
    "_tracing": "tracing",
    "_transport": "errors",
}
"""For each module of the client, the tests that are most likely to notice a change. They run first, then all others."""
_SDK_TESTS = "calls connection errors image_prompts public request result retries show tls tracing urls values".split()
_DENOISER = {
    "admission": "admission",
    "answers": "pace loop",
    "assembly": "step_networks conditioning",
    "batch": "batch row_buckets step_networks",
    "conditioning": "conditioning step_networks guidance_end",
    "control": "prepared_controls step_networks",
    "control_plan": "step_networks",
    "features": "conditioning step_networks",
    "image_prompts": "conditioning batch windows",
    "initial_latents": "initial_latents",
    "job": "job guidance_end step_networks device_waits",
    "loop": "loop pace",
    "networks": "step_networks",
    "policy": "policy row_buckets",
    "preview": "previews",
    "schedulers": "schedulers device_waits",
    "warm_up": "warm_up row_buckets",
    "windows": "windows",
}
"""The same for each module of the denoiser."""
_DENOISER_TESTS = sorted({name for names in _DENOISER.values() for name in names.split()})
TESTS: dict[str, tuple[str, ...]] = {
    **{
        f"{SERVING}/denoiser/{module}.py": tuple(
            f"serving/test_{name}.py" for name in dict.fromkeys((*names.split(), *_DENOISER_TESTS))
        )
        for module, names in _DENOISER.items()
    },
    f"{SERVING}/pipeline/request.py": ("serving/test_parse.py",),
    **{
        f"{CLIENT}/{module}.py": tuple(f"client/test_client_{name}.py" for name in dict.fromkeys((first, *_SDK_TESTS)))
        for module, first in _SDK.items()
    },
}
"""The modules that are mutated, and the tests of each, relative to `tests`. `_parameters.py` is generated."""
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}


class Mutant(NamedTuple):
    """One change of the module at `path`: the node with this number, in the order of `_nodes`."""

    path: str
    node: int
    line: int
    before: str
    after: str

    def source(self) -> str:
        """The whole module with the change."""
        tree = ast.parse((ROOT / self.path).read_text())
        parent, field, index, node = list(_nodes(tree))[self.node]
        _put(parent, field, index, _changed(node))
        return ast.unparse(tree)


def mutants(path: str) -> list[Mutant]:
    """Every mutant of the module at `path`."""
    found = []
    for number, (*_, node) in enumerate(_nodes(ast.parse((ROOT / path).read_text()))):
        changed = _changed(node)
        if changed is not None:
            line = node.lineno  # type: ignore[attr-defined]
            found.append(Mutant(path, number, line, ast.unparse(node), ast.unparse(changed)))
    return found


def _nodes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """The nodes of a module that may change, each after its parent, with its field and index there.

    Annotations, decorators, and log messages stay, as they do not change results. So do assertions and `strict` of
    `zip`, which only guard against mistakes, and named constants of a module, as a test could only repeat their values.
    """
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(node, ast.AST) or (isinstance(tree, ast.Module) and not _has_behavior(node)):
                continue
            if isinstance(node, ast.Assert) or (isinstance(node, ast.Expr) and ast.unparse(node).startswith("logger.")):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":
                continue
            yield tree, field, index, node
            yield from _nodes(node)


def _has_behavior(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _changed(node: ast.AST) -> ast.AST | None:
    """`node` with one small change; None if this kind of node stays."""
    made = copy.deepcopy(node)
    if isinstance(made, ast.Compare) and type(made.ops[0]) in _SWAPS:
        made.ops[0] = _SWAPS[type(made.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(made, ast.BoolOp | ast.BinOp | ast.AugAssign) and type(made.op) in _SWAPS:
        made.op = _SWAPS[type(made.op)]()  # type: ignore[assignment]
    elif isinstance(made, ast.Constant) and isinstance(made.value, bool):
        made.value = not made.value
    elif isinstance(made, ast.Constant) and isinstance(made.value, int | float):
        made.value += 1
    elif isinstance(made, ast.UnaryOp) and isinstance(made.op, ast.Not | ast.USub):
        return made.operand
    elif isinstance(made, ast.IfExp):
        made.body, made.orelse = made.orelse, made.body
    elif isinstance(made, ast.Expr) and isinstance(made.value, ast.Call):
        return ast.copy_location(ast.Pass(), node)
    else:
        return None
    return made


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST | None) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def run_tests(tree: Path, tests: Sequence[str], limit_s: float | None = None) -> int | None:
    """Run `tests` on the code in `tree`, in a fork of this process; return pytest's exit status, None if too slow."""
    child = multiprocessing.get_context("fork").Process(target=_run_here, args=(tree, tests))
    child.start()
    child.join(limit_s)
    if child.exitcode is None:
        child.kill()
        child.join()
        return None
    return child.exitcode


def _run_here(tree: Path, tests: Sequence[str]) -> None:
    import pytest

    _forget_our_modules()
    os.chdir(tree)
    sys.path[:0] = [str(tree / folder) for folder in (*FOLDERS, "tests")]
    sys.dont_write_bytecode = True  # mutants of equal length, made within a second, would share a file
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    status = pytest.main(["-x", "-q", "--in-process", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)])
    os._exit(status)  # threads that a mutant left behind must not keep it alive


def _forget_our_modules() -> None:
    """Make the tests import the changed modules. Modules of other packages stay, as they take seconds to import."""
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or sys.prefix)
        if name != "__main__" and file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix):
            del sys.modules[name]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="ends of paths, such as denoiser/policy.py; default: all of them")
    parser.add_argument("--count", type=int, default=40, help="mutants to sample (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--least", type=float, default=85.0, help="percentage that must be noticed (default: 85)")
    options = parser.parse_args(arguments)
    paths = [path for path in TESTS if not options.modules or path.endswith(tuple(options.modules))]
    every = [mutant for path in paths for mutant in mutants(path)]
    sample = sorted(random.Random(options.seed).sample(every, min(options.count, len(every))))
    print(f"{len(sample)} of {len(every)} mutants of {len(paths)} modules, seed {options.seed}", flush=True)

    sys.path.insert(0, str(ROOT / "tests"))
    import conftest  # noqa: F401  # here, with all that it imports: forks then share what takes seconds

    sources = [mutant.source() for mutant in sample]  # now: the working tree may change while the tests run
    noticed, seconds = 0, dict[frozenset[str], float]()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in (*FOLDERS, "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        for mutant, source in zip(sample, sources, strict=True):
            tests = TESTS[mutant.path]
            if (same := frozenset(tests)) not in seconds:
                began = time.monotonic()
                if status := run_tests(tree, tests):
                    print(f"the tests of {mutant.path} fail without a change (status {status})", file=sys.stderr)
                    return 2
                seconds[same] = time.monotonic() - began
            file = tree / mutant.path
            original = file.read_text()
            file.write_text(source)
            status = run_tests(tree, tests, 30 + 5 * seconds[same])
            file.write_text(original)
            noticed += status != 0
            verdict = "unnoticed" if status == 0 else "too slow " if status is None else "noticed  "
            print(f"{verdict}  {mutant.path}:{mutant.line}  {mutant.before}  ->  {mutant.after}", flush=True)
    share = 100 * noticed / len(sample)
    print(f"noticed {noticed} of {len(sample)}: {share:.0f} % (seed {options.seed})")
    return 0 if share >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())

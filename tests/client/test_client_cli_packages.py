"""`imprompt export`, `serve`, `demo` and `bench`: options, missing packages and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from imprompt_serving.launcher import Addresses


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["export", "bundle.toml", "-o", "repo"], "imprompt_export", "export"),
        (["serve", "repo"], "imprompt_serving.launcher", "server"),
        (["doctor"], "imprompt_serving.launcher.doctor", "server"),
        (["bench", "--help"], "imprompt_bench.cli", "bench"),
    ],
)
def test_missing_package_error_names_the_extra(
    run: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    outcome = run(*arguments)
    assert outcome.exit_code == 1
    assert f'pip install "imprompt[{extra}]"' in outcome.stderr.replace("\n", "")


def test_a_missing_demo_says_how_to_get_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imprompt_demo", None)
    outcome = run("demo")
    assert outcome.exit_code == 1
    assert "in a checkout, run `make demo` or `pip install ./demo`" in outcome.stderr.replace("\n", " ")


def in_a_fresh_python(*arguments: str, without: str = "", code: str = "") -> subprocess.CompletedProcess[str]:
    """Run `imprompt` in a fresh process that cannot import the package `without`."""
    script = f"import sys; sys.modules.update({dict.fromkeys(filter(None, [without]))}); {code}\n"
    script += f"from imprompt.cli import app; app({list(arguments)}, prog_name='imprompt')"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "without", "extra"),
    [
        (["demo"], "torch", "cpu,export,server"),
        (["bench", "--help"], "psutil", "bench"),
        (["bench"], "torch", "bench,cpu,export,server"),
    ],
)
def test_missing_dependency_error_names_the_extra(arguments: list[str], without: str, extra: str) -> None:
    outcome = in_a_fresh_python(*arguments, without=without)
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stderr
    assert without in outcome.stderr
    assert outcome.stderr.endswith(f'This command needs more packages: pip install "imprompt[{extra}]"\n')


@pytest.mark.parametrize(
    "bug",
    [
        "from imprompt_serving.errors import Nothing",
        "import imprompt_serving.nothing",
        "from json import nothing",
    ],
)
def test_broken_imports_of_our_own_are_not_reported_as_missing_packages(
    run: Any, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    module = ModuleType("imprompt_demo")
    exec(f"def main(arguments):\n    {bug}", vars(module))
    monkeypatch.setitem(sys.modules, "imprompt_demo", module)
    outcome = run("demo")
    assert isinstance(outcome.exception, ImportError)
    assert "pip install" not in outcome.output


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    class BundleError(Exception):
        pass

    class ParityError(Exception):
        pass

    class EngineError(Exception):
        """Stands for `imprompt_export.EngineError`."""

    content: dict[str, Any] = {"BundleError": BundleError, "EngineError": EngineError}
    content["export"] = lambda bundle, repository, refit_from: ["row"]
    parity = {"ParityError": ParityError}
    report = {"table": lambda rows: f"table of {rows}"}
    install(monkeypatch, imprompt_export__parity=parity, imprompt_export__report=report)
    module = SimpleNamespace(**content)
    monkeypatch.setitem(sys.modules, "imprompt_export", module)
    return {"module": module, **content, **parity}


def test_export_prints_its_report(run: Any, exporter: dict[str, Any]) -> None:
    outcome = run("export", "bundle.toml", "-o", "repo")
    assert (outcome.exit_code, outcome.stdout) == (0, "table of ['row']\n")


@pytest.mark.parametrize("kind", ["BundleError", "EngineError", "ParityError"])
def test_failed_export_prints_the_reason(run: Any, exporter: dict[str, Any], kind: str) -> None:
    def fail(bundle: Path, repository: Path, refit_from: Path | None) -> None:
        raise exporter[kind](f"{bundle}: [engine] is wrong")

    exporter["module"].export = fail
    outcome = run("export", "bundle.toml", "-o", "repo")
    assert outcome.exit_code == 1
    assert "error: bundle.toml: [engine] is wrong" in outcome.stderr


def test_serve_prints_ready_with_its_addresses(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def serve(repository: Path, *, on_ready: Any, on_loading: Any, **options: Any) -> int:
        given.update(options, repository=repository)
        on_loading("1 of 2 models loaded; loading b")
        on_ready(Addresses(grpc="h:1", metrics="h:3"))
        return 1

    install(monkeypatch, imprompt_serving__launcher={"serve": serve, "LaunchError": RuntimeError})
    outcome = run(
        "serve", "repo", "--grpc-port", "1", "--host", "0.0.0.0", "--drain-timeout", "5", "--restart", "never"
    )
    assert outcome.stderr == "1 of 2 models loaded; loading b\n"
    assert outcome.stdout == "ready grpc=h:1 metrics=h:3\n"
    assert outcome.exit_code == 1
    assert given == {
        "repository": Path("repo"),
        "grpc_port": 1,
        "http_port": None,
        "metrics_port": 8002,
        "health_port": None,
        "restart": False,
        "max_canary_age": 30.0,
        "host": "0.0.0.0",
        "allow_remote": False,
        "drain_timeout": 5.0,
        "triton_spans_to": None,
        "verbose": False,
    }
    assert os.environ["IMPROMPT_REQUEST_LOG"] == "-"


def test_log_and_collector_reach_all_processes_of_a_server(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def serve(repository: Path, **options: Any) -> int:
        given.update(options)
        return 0

    install(monkeypatch, imprompt_serving__launcher={"serve": serve, "LaunchError": RuntimeError})
    collector = ("--otlp-endpoint", "http://localhost:4318")
    assert run("serve", "repo", "--request-log", "log.jsonl", *collector, "--triton-spans").exit_code == 0
    assert given["triton_spans_to"] == "http://localhost:4318"
    assert os.environ["IMPROMPT_REQUEST_LOG"] == str(Path("log.jsonl").absolute())
    assert os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://localhost:4318"


@pytest.mark.parametrize("command", [("serve", "repo"), ("gateway",)])
def test_log_that_cannot_be_written_is_an_error(run: Any, command: tuple[str, ...]) -> None:
    outcome = run(*command, "--request-log", "nowhere/log")
    assert outcome.exit_code == 1
    assert "nowhere/log: No such file or directory" in outcome.stderr


def test_spans_of_triton_need_a_collector(run: Any) -> None:
    assert "--triton-spans needs --otlp-endpoint" in run("serve", "repo", "--triton-spans").stderr


def test_failed_server_start_prints_the_reason(run: Any) -> None:
    outcome = run("serve", "nowhere")
    assert outcome.exit_code == 1
    assert "error: no model repository at nowhere" in outcome.stderr


@pytest.mark.parametrize(("command", "module"), [("demo", "imprompt_demo"), ("bench", "imprompt_bench__cli")])
def test_demo_and_bench_receive_their_arguments(
    run: Any, monkeypatch: pytest.MonkeyPatch, command: str, module: str
) -> None:
    given: list[str] = []
    install(monkeypatch, **{module: {"main": lambda arguments: given.extend(arguments)}})
    assert run(command, "load", "--callers", "4", "--help").exit_code == 0
    assert given == ["load", "--callers", "4", "--help"]

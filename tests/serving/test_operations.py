"""The operations page and the dashboard name metrics that exist, and the metrics count correctly."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from imprompt import InvalidRequest
from imprompt_serving import metrics
from imprompt_serving.denoiser.policy import FIRST_PRIORITY, LAST_PRIORITY, PRIORITY_PATIENCE, START_PATIENCE
from imprompt_serving.specs import Limits
from served import Served

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "operations.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
METRIC = re.compile(r"\b(?:imprompt|nv)_[a-z_]+\b")
CAT: dict[str, Any] = {
    "prompt": "a cat",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "scheduler": "DDIMScheduler",
}


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def scraped(served: Any) -> dict[str, dict[str, set[str]]]:
    """Label values of each metric of a running server."""
    server: Served = served("sd15")
    server.generate(**CAT)
    found: dict[str, dict[str, set[str]]] = {}
    for sample in server.metrics():
        name, _, labels = sample.partition("{")
        values = found.setdefault(name, {})
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            values.setdefault(label, set()).add(value)
    return found


def test_dashboard_metrics_exist(scraped: dict[str, dict[str, set[str]]]) -> None:
    assert len(expressions()) > 10
    for expression in expressions():
        for name in METRIC.findall(expression):
            assert name in scraped, expression
        for name, selector in re.findall(r"(\w+)\{([^}]*)\}", expression):
            for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', selector):
                assert label in scraped[name], expression
                assert operator == "=~" or value in scraped[name][label], expression
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            used = [scraped[name] for name in METRIC.findall(expression)]
            assert all(label.strip() in known for known in used for label in labels.split(",")), expression


def test_documented_metrics_exist(scraped: dict[str, dict[str, set[str]]]) -> None:
    plain = {re.sub(r"_(bucket|count|sum)$", "", name) for name in scraped} | scraped.keys()
    names = set(METRIC.findall(PAGE))
    assert len(names) > 10
    assert names <= plain


def test_every_metric_is_documented_with_its_kind_and_label() -> None:
    rows = dict(re.findall(r"^\| `(imprompt_\w+)` \| (\w+ \| (?:`\w+`)? ?)\|", PAGE, re.MULTILINE))
    for spec in (*metrics.PIPELINE, *metrics.DENOISER):
        kind, label = rows[spec.name].split("|")
        assert kind.strip() == spec.kind.lower()
        assert label.strip() == (f"`{spec.label}`" if spec.label else "")
    assert all(f"| `{stage}` | {doc} |" in PAGE for stage, doc in metrics.STAGES.items())


def test_documented_numbers_match_the_code() -> None:
    span = PRIORITY_PATIENCE * (LAST_PRIORITY - FIRST_PRIORITY)
    text = " ".join(PAGE.split())
    assert f"go first for {START_PATIENCE} calls" in text
    assert f"by {PRIORITY_PATIENCE} calls per level" in text
    assert f"at most {START_PATIENCE + span} calls ({START_PATIENCE}, plus {span} at priority {LAST_PRIORITY})" in text
    assert f"at most {Limits().waiting_rows} may" in text


def test_metrics_count_requests_and_calls(sd15: Served) -> None:
    def since(name: str) -> float:
        return sd15.metrics()[name] - before[name]

    time.sleep(0.2)  # a separate thread updates the metrics
    before = sd15.metrics()
    sd15.generate(**CAT)
    with pytest.raises(InvalidRequest):
        sd15.generate(**CAT | {"scheduler": "None"})
    labels = 'model="sd15_denoiser"'
    end = time.monotonic() + 5.0
    while not since('imprompt_stage_seconds_count{model="sd15",stage="total"}') and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)
    assert since(f"imprompt_tick_rows_count{{{labels}}}") == 3
    assert since(f"imprompt_tick_rows_sum{{{labels}}}") == 6
    assert since(f'imprompt_tick_rows_bucket{{{labels},le="1"}}') == 0
    assert since(f'imprompt_tick_rows_bucket{{{labels},le="2"}}') == 3
    assert 0 < since(f"imprompt_tick_seconds_sum{{{labels}}}") < 60
    assert since(f'imprompt_jobs_ended_total{{{labels},outcome="finished"}}') == 1
    assert since('imprompt_requests_total{model="sd15",status="OK"}') == 1
    assert since('imprompt_requests_total{model="sd15",status="INVALID_ARGUMENT"}') == 1
    assert since('imprompt_stage_seconds_count{model="sd15",stage="denoise"}') == 1


def test_only_the_denoiser_loads_torch(served: Any) -> None:
    server: Served = served("sd15")
    server.generate(**CAT)
    loaded = set()
    for instance, pid in server.server.stub_pids.items():
        maps = psutil.Process(pid).memory_maps()
        assert maps
        if any("libtorch" in mapped.path for mapped in maps):
            loaded.add(instance.removesuffix("_0_0"))
    assert loaded == {"sd15_denoiser"}

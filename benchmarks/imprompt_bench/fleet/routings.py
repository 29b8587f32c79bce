"""The ways in which Envoy can choose a server, as edits of its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROWS_HEADER = "x-imprompt-rows"
REPORT_S = 0.2
"""Time between two load reports of a member."""
_SCRIPT = Path(__file__).with_name("least_rows.lua")
_POLICIES = "type.googleapis.com/envoy.extensions.load_balancing_policies"

Change = Callable[[dict[str, Any]], None]


def routings(members: Sequence[str], load_port: int) -> dict[str, Change]:
    """Return the edits for each way, by name.

    Args:
        members: `HOST:PORT` of each server.
        load_port: port on which each server's host reports its load.
    """
    return {
        "round robin": lambda config: _choose(config, lb_policy="ROUND_ROBIN"),
        "least requests, 2 draws": lambda config: _least_request(config, choice_count=2),
        "least requests, 8 draws": lambda config: _least_request(config, choice_count=8),
        "least requests of all": lambda config: _least_request(config, selection_method="FULL_SCAN"),
        "weights by load reports": lambda config: _orca(config, load_port),
        "least outstanding rows": lambda config: _least_rows(config, members),
    }


def _choose(config: dict[str, Any], **fields: Any) -> None:
    """Replace the policy of the cluster. The servers of a measurement have no health port."""
    (cluster,) = config["static_resources"]["clusters"]
    for name in ("lb_policy", "least_request_lb_config", "health_checks"):
        del cluster[name]
    cluster.update(fields)


def _policy(config: dict[str, Any], name: str, message: str, **fields: Any) -> None:
    typed = {"@type": f"{_POLICIES}.{name}.v3.{message}", **fields}
    extension = {"name": f"envoy.load_balancing_policies.{name}", "typed_config": typed}
    _choose(config, load_balancing_policy={"policies": [{"typed_extension_config": extension}]})


def _least_request(config: dict[str, Any], **fields: Any) -> None:
    _policy(config, "least_request", "LeastRequest", **fields)


def _orca(config: dict[str, Any], load_port: int) -> None:
    """Weight members by their load reports, which a service beside each of them streams (ORCA, out of band)."""
    seconds = f"{REPORT_S}s"
    _policy(
        config,
        "client_side_weighted_round_robin",
        "ClientSideWeightedRoundRobin",
        enable_oob_load_report=True,
        oob_reporting_period=seconds,
        oob_reporting_config={"port_value": load_port},
        weight_update_period=seconds,
        blackout_period="0s",
    )


def _least_rows(config: dict[str, Any], members: Sequence[str]) -> None:
    _choose(config, lb_policy="ROUND_ROBIN")
    script = _SCRIPT.read_text().replace("MEMBERS", ", ".join(f'["{member}"] = 0' for member in members))
    (listener,) = config["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"].insert(
        0,
        {
            "name": "envoy.filters.http.lua",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
                "default_source_code": {"inline_string": script},
            },
        },
    )

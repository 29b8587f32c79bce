"""Ask a running Triton whether it is ready, and what it is doing."""

from __future__ import annotations

import http.client
import re

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from imprompt_serving.drain import IN_FLIGHT_METRIC
from imprompt_serving.launcher.addresses import Addresses, listens

TIMEOUT_S = 5.0


def is_ready(addresses: Addresses) -> bool:
    """Return whether all ports answer and every model is ready (Triton's default, strict readiness)."""
    # Open a new channel each time: after failures, a channel waits longer and longer before it reconnects.
    with grpc.insecure_channel(addresses.grpc, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            ready = bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=TIMEOUT_S).ready)
        except grpc.RpcError:
            return False
    # Triton opens these after its gRPC port.
    return ready and all(listens(address) for address in (addresses.metrics, addresses.http) if address)


def requests_in_flight(metrics_address: str, timeout: float = TIMEOUT_S) -> int | None:
    """Sum the in-flight gauges of the models; None if Triton does not answer."""
    try:
        text = _get(metrics_address, "/metrics", timeout)
    except (OSError, http.client.HTTPException):
        return None
    return sum(int(float(value)) for value in re.findall(rf"^{IN_FLIGHT_METRIC}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _get(address: str, path: str, timeout: float) -> str:
    """Return the text of an HTTP GET. Not with urllib, which would use a proxy from the environment."""
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()

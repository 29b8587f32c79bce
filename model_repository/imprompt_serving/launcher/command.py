"""The command line of Triton."""

from __future__ import annotations

import secrets
from pathlib import Path

from imprompt_serving.launcher.install import TritonInstall
from imprompt_serving.tracing import HEADERS

RESPONSE_CACHE_BYTES = 256 * 2**20
CLOSED_APIS = "shared-memory,trace,logging,model-repository"
# Calls to other models, and responses, that a Python model can have in flight; further ones wait. Triton's default: 32.
MODEL_THREADS = 64
# A pattern for the headers that the pipelines get as parameters of a request.
FORWARDED_HEADERS = "|".join(HEADERS)
# How long Triton waits for running requests after SIGTERM. Short, because the drain has already waited, and because
# Triton waits this long whenever a client keeps a stream open, even an idle one.
EXIT_TIMEOUT_S = 3


def triton_command(
    triton: TritonInstall,
    repository: Path,
    *,
    address: str,
    ports: dict[str, int],
    scratch: Path,
    shared_memory: str,
    spans_to: str | None = None,
    verbose: bool,
) -> list[str]:
    """Return the command that starts `triton`.

    Args:
        address: numeric address to listen on.
        ports: ports by service (`grpc`, `metrics`, and `http` if Triton serves HTTP).
        scratch: folder for files of this server.
        shared_memory: prefix of the names of its shared memory regions.
        spans_to: base address of the OpenTelemetry collector for Triton's own spans; None for no spans.
    """
    return [
        str(triton.binary),
        f"--model-repository={repository}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        f"--backend-directory={triton.prepare_backends(scratch)}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
        f"--backend-config=python,thread-pool-size={MODEL_THREADS}",
        f"--cache-directory={triton.caches}",
        f"--cache-config=local,size={RESPONSE_CACHE_BYTES}",
        *_listen_options(address, ports),
        f"--grpc-header-forward-pattern={FORWARDED_HEADERS}",
        "--grpc-infer-allocation-pool-size=1",  # number of request buffers to keep; default: 8
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        f"--log-info={str(verbose).lower()}",
        *_trace_options(spans_to),
    ]


def _trace_options(spans_to: str | None) -> list[str]:
    if spans_to is None:
        return []
    settings = {
        "mode": "opentelemetry",
        "level": "TIMESTAMPS",
        "rate": "0",  # only requests that carry a trace context: canaries do not
        "opentelemetry,url": f"{spans_to.rstrip('/')}/v1/traces",
        "opentelemetry,resource": "service.name=triton",
    }
    return [f"--trace-config={name}={value}" for name, value in settings.items()]


def _listen_options(address: str, ports: dict[str, int]) -> list[str]:
    """Return Triton's options for its ports, with access to its administrative APIs closed.

    They require a header with a random value that is never stored. `--model-control-mode=none` also disables loading
    and unloading.
    """
    closed = f"{CLOSED_APIS}:imprompt-operator={secrets.token_urlsafe()}"
    options = [f"--{name}-address={address}" for name in ports]
    options += [f"--{name}-port={port}" for name, port in ports.items()]
    options.append(f"--grpc-restricted-protocol={closed}")
    if "http" not in ports:
        return [*options, "--allow-http=false"]
    return [*options, f"--http-restricted-api={closed}", f"--http-header-forward-pattern={FORWARDED_HEADERS}"]

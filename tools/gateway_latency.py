"""Compare a request by gRPC with the same request through a gateway: `python tools/gateway_latency.py --help`.

The ways take turns, so that other work on the machine affects all of them.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import time
from collections.abc import Callable

import openai
from PIL import Image

from imprompt import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server")
    parser.add_argument("--gateway", default="http://localhost:8080", help="address of a gateway to that server")
    parser.add_argument("--model", default="world", help="bundle to use")
    parser.add_argument("--adapter", default="plain", help="IP-Adapter to use")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--requests", type=int, default=50, help="requests of each way, after three that do not count")
    options = parser.parse_args()

    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "PNG")
    style = file.getvalue()
    body = {
        "num_inference_steps": options.steps,
        "seed": 0,
        "ip_adapter_image": {options.adapter: base64.b64encode(style).decode()},
    }
    through = openai.OpenAI(base_url=f"{options.gateway}/v1", api_key="none", max_retries=0)
    with Client(options.url) as client:

        def by_grpc() -> object:
            return client.generate(
                model=options.model,
                prompt="a flower",
                num_inference_steps=options.steps,
                seed=0,
                ip_adapter_image={options.adapter: style},
                output_format="png",
            ).images[0]

        def by_gateway() -> object:
            answer = through.images.generate(model=options.model, prompt="a flower", extra_body=body)
            assert answer.data
            data = base64.b64decode(answer.data[0].b64_json or "")
            return Image.open(io.BytesIO(data)).load()

        ways: dict[str, Callable[[], object]] = {"gRPC": by_grpc, "gateway": by_gateway}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.requests + 3):
            for name, send in ways.items():
                start = time.perf_counter()
                send()
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        counted = values[3:]
        p50, p90 = statistics.median(counted), statistics.quantiles(counted, n=10)[8]
        print(f"{name:>8}: p50 {p50 * 1e3:.1f} ms, p90 {p90 * 1e3:.1f} ms, of {len(counted)} requests")


if __name__ == "__main__":
    main()

# imprompt in a container: `docker build --target cpu` on Triton from pip, `--target gpu` on NVIDIA's Triton container
# (docs/operations.md). The tests run the entry point and the health check, but do not build these images.
ARG TRITON=26.07

FROM python:3.12-slim AS cpu
WORKDIR /opt/imprompt
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY client client
COPY export export
COPY model_repository model_repository
COPY gateway gateway
COPY benchmarks benchmarks
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    ".[cpu,export,server,gateway,cache,otel]"
COPY deploy/entrypoint deploy/healthcheck /usr/local/bin/
# A volume for engine caches that is mounted there starts with this owner.
RUN useradd --uid 10001 --create-home imprompt && install --directory --owner 10001 /home/imprompt/.cache
USER 10001
EXPOSE 8001 8002 8003
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=10m --interval=10s --timeout=6s CMD ["healthcheck"]
ENTRYPOINT ["entrypoint"]
CMD ["serve", "/repository"]

FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3 AS gpu
# An engine only loads in the TensorRT version that built it, so install the Python package in the image's version.
RUN --mount=type=cache,target=/root/.cache/pip \
    version="$(dpkg-query --showformat='${Version}' --show libnvinfer10 2>/dev/null \
        || dpkg-query --showformat='${Version}' --show libnvinfer11)" \
    && pip install --break-system-packages "tensorrt-cu13==${version%%-*}.*"
WORKDIR /opt/imprompt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY export export
COPY model_repository model_repository
COPY gateway gateway
COPY benchmarks benchmarks
# The extra `server` is left out: it would install Triton from pip and limit numpy to its version.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --break-system-packages ".[cpu,export,gateway,cache,otel]" psutil scipy tokenizers torchsde
COPY deploy/entrypoint deploy/healthcheck /usr/local/bin/
# A volume for engine caches that is mounted there starts with this owner.
RUN useradd --uid 10001 --create-home imprompt && install --directory --owner 10001 /home/imprompt/.cache
USER 10001
EXPOSE 8001 8002 8003
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=10m --interval=10s --timeout=6s CMD ["healthcheck"]
# NVIDIA's own entry point prints a banner and checks the driver; it then runs ours.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "entrypoint"]
CMD ["serve", "/repository"]

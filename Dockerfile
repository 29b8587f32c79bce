# imprompt on NVIDIA's Triton container (docs/gpu.md). The tests do not build this image.
ARG TRITON=26.07
FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3

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
COPY benchmarks benchmarks
# The extra `server` is left out: it would install Triton from pip and limit numpy to its version.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --break-system-packages ".[cpu,export]" psutil scipy tokenizers torchsde

EXPOSE 8000 8001 8002
HEALTHCHECK --start-period=10m CMD curl --fail --silent localhost:8000/v2/health/ready
# The secret keeps callers away from internal models, and from Triton's management APIs, which need it as a header.
CMD ["sh", "-c", "secret=$(cat /proc/sys/kernel/random/uuid) && IMPROMPT_SECRET=$secret exec tritonserver \
     --model-repository=/repository --disable-auto-complete-config --exit-on-error=true \
     --cache-config=local,size=268435456 --backend-config=python,thread-pool-size=64 \
     --grpc-restricted-protocol=shared-memory,trace,logging,model-repository:imprompt-operator=$secret \
     --http-restricted-api=shared-memory,trace,logging,model-repository:imprompt-operator=$secret"]

# syntax=docker/dockerfile:1
# docker build --target gpu -t saccade:gpu .    on vLLM's image, for NVIDIA GPUs
# docker build --target cpu -t saccade:cpu .    without a GPU
#
# The cpu image uses Python 3.11, for which deploy/requirements-cpu.txt is resolved; the gpu image
# uses the Python of vLLM's image.
ARG VLLM_VERSION=0.32.0

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /build
COPY pyproject.toml README.md ./
COPY server server
COPY clients/python clients/python
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/pip wheel --no-deps --wheel-dir /wheels . ./clients/python

FROM python:3.11-slim-bookworm AS cpu-dependencies
WORKDIR /build
COPY deploy/install.sh deploy/requirements-cpu.txt deploy/
RUN --mount=type=cache,target=/root/.cache/pip \
    LOCK=deploy/requirements-cpu.txt deploy/install.sh /opt/venv

FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu-dependencies
WORKDIR /build
COPY deploy/requirements-gpu.txt deploy/
# The environment sees vLLM and its packages, and contains only the packages whose versions differ.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/pip install --no-deps --requirement deploy/requirements-gpu.txt

FROM python:3.11-slim-bookworm AS cpu
# vLLM on a CPU cannot be imported without libnuma. Debian keeps only its newest version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cpu-dependencies /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/venv/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && install --directory --mode 1777 /var/cache/saccade
# Any user may run the image, also with a read-only root: models and the compiled code of vLLM,
# Triton and numba go to the volume, sockets and similar files to /tmp. Idle connections stay open
# for longer than in most proxies, so that no proxy sends a request on a closed one. vLLM's usage
# reports are off.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/var/cache/saccade \
    USER=saccade \
    XDG_CACHE_HOME=/var/cache/saccade \
    HF_HOME=/var/cache/saccade/huggingface \
    NUMBA_CACHE_DIR=/var/cache/saccade/numba \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/saccade/torchinductor \
    VLLM_HTTP_TIMEOUT_KEEP_ALIVE=75 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /var/cache/saccade
VOLUME /var/cache/saccade
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h --start-interval=2s --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["saccade", "serve"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Saccade" \
      org.opencontainers.image.revision="${REVISION}"

# The same, based on vLLM's image.
FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu
COPY --from=gpu-dependencies /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/venv/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && install --directory --mode 1777 /var/cache/saccade
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/var/cache/saccade \
    USER=saccade \
    XDG_CACHE_HOME=/var/cache/saccade \
    HF_HOME=/var/cache/saccade/huggingface \
    NUMBA_CACHE_DIR=/var/cache/saccade/numba \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/saccade/torchinductor \
    VLLM_HTTP_TIMEOUT_KEEP_ALIVE=75 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /var/cache/saccade
VOLUME /var/cache/saccade
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h --start-interval=2s --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["saccade", "serve"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Saccade" \
      org.opencontainers.image.revision="${REVISION}"

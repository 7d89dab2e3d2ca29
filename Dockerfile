# Two images from one file: `app` serves HTTP and contains no torch, `worker` trains.
#   docker build --target app -t tuneyard-app .
#   docker build --target worker -t tuneyard-worker .
ARG PYTHON_IMAGE=python:3.13-slim-trixie

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/tuneyard/bin:$PATH \
    TUNEYARD_MODE=production TUNEYARD_HOME=/data TUNEYARD_HOST=0.0.0.0
RUN groupadd --gid 10001 tuneyard \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin tuneyard \
    && install -d -o tuneyard -g tuneyard -m 0700 /data
WORKDIR /data

FROM base AS build
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 VIRTUAL_ENV=/opt/tuneyard
WORKDIR /srv/tuneyard
COPY pyproject.toml requirements.lock README.md LICENSE ./
RUN /opt/uv/bin/uv venv --python "$(command -v python)" /opt/tuneyard

# The lock file is used as constraints, so each image gets only its own extras, at the locked versions and hashes. The
# project itself is installed as a pointer to /srv/tuneyard: a change of our code makes a small layer, not a new 6 GB.
FROM build AS build-app
RUN /opt/uv/bin/uv pip install --require-hashes -r pyproject.toml -c requirements.lock
RUN mkdir app worker migrations && touch app/__init__.py worker/__init__.py migrations/__init__.py \
    && /opt/uv/bin/uv pip install --no-deps --editable .

FROM build AS build-worker
RUN /opt/uv/bin/uv pip install --require-hashes -r pyproject.toml --extra worker -c requirements.lock
RUN mkdir app worker migrations && touch app/__init__.py worker/__init__.py migrations/__init__.py \
    && /opt/uv/bin/uv pip install --no-deps --editable .

FROM base AS source
COPY app /srv/tuneyard/app
COPY worker /srv/tuneyard/worker
COPY migrations /srv/tuneyard/migrations
RUN python -m compileall -q /srv/tuneyard

FROM base AS app
COPY --from=build-app /opt/tuneyard /opt/tuneyard
COPY --from=source /srv/tuneyard /srv/tuneyard
USER tuneyard
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["uvicorn", "app.main:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", \
     "--timeout-graceful-shutdown", "10", "--no-server-header", "--no-access-log"]

FROM base AS worker
# torch needs an OpenMP runtime that the slim image lacks.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build-worker /opt/tuneyard /opt/tuneyard
COPY --from=source /srv/tuneyard /srv/tuneyard
# Images from strangers are decoded here: nothing under / is writable, the compiler caches go to the data volume.
ENV TORCHINDUCTOR_CACHE_DIR=/data/cache/inductor TORCH_HOME=/data/cache/torch OPENBLAS_NUM_THREADS=1
USER tuneyard
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 CMD ["python", "-m", "worker.health"]
CMD ["python", "-m", "worker.main"]

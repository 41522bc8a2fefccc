# The HTTP server with vLLM (docs/serving.md). SERVE_DEVICE=cpu or gpu chooses vLLM's build; CUDA comes with PyTorch's packages.
#
#   docker build -t images .
#   docker build -t images --build-arg SERVE_DEVICE=gpu .
#
# Training, extraction, sampling and evaluation (docs/imagenet.md), a shell with `python3` and the wrappers of scripts/:
#
#   docker build -t images-train --target train .
FROM python:3.11-slim-bookworm AS base
# A compiler, for what PyTorch and Triton compile when they run.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*
WORKDIR /srv/images
# What says which packages there are comes first: a change of the code installs nothing anew.
COPY requirements.txt pyproject.toml README.md ./
COPY constraints constraints
COPY scripts/setup.sh scripts/setup.sh
RUN useradd --create-home images
ENV PYTHONUNBUFFERED=1

FROM base AS train
RUN PIP_NO_CACHE_DIR=1 bash scripts/setup.sh text train eval
COPY . .
USER images
ENV PATH=/srv/images/.venv/bin:$PATH
CMD ["bash"]

FROM base AS serve
ARG SERVE_DEVICE=cpu
RUN SERVE_DEVICE=$SERVE_DEVICE PIP_NO_CACHE_DIR=1 bash scripts/setup.sh serve
COPY . .
USER images
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD [".venv-serve/bin/python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT [".venv-serve/bin/python", "-m", "autoregressive.serve.server", "--host", "0.0.0.0"]

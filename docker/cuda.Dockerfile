# rayhf on NVIDIA GPUs, from the extra gpu of pyproject.toml. The lock is for CPU machines only.
# docker build -f docker/cuda.Dockerfile -t rayhf:cuda .
FROM nvidia/cuda:12.9.1-devel-ubuntu24.04

# The driver comes from the host; DeepSpeed and vLLM compile kernels with this image's nvcc.
# hadolint ignore=DL3008  # a distribution keeps only the newest version of a package
RUN apt-get update \
    && apt-get install --no-install-recommends --yes g++ make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The image has a user with uid 1000 already.
RUN mkdir /opt/rayhf /work && chown ubuntu /opt/rayhf /work
USER 1000
WORKDIR /opt/rayhf
COPY --chown=ubuntu . .
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir ".[gpu,qlora]"

ENV PATH="/opt/rayhf/.venv/bin:$PATH"
WORKDIR /work
CMD ["rayhf", "--help"]

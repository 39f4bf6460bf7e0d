# rayhf on CPUs, with the versions of requirements/cpu.lock.
# docker build -f docker/cpu.Dockerfile -t rayhf:cpu .
FROM python:3.11.14-slim-bookworm

# vLLM and DeepSpeed compile small kernels when they start; vLLM needs libnuma.
# hadolint ignore=DL3008  # a distribution keeps only the newest version of a package
RUN apt-get update \
    && apt-get install --no-install-recommends --yes g++ make libnuma1 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 rayhf && mkdir /opt/rayhf /work && chown rayhf /opt/rayhf /work
USER 1000
WORKDIR /opt/rayhf
COPY --chown=rayhf . .
RUN PYTHON=python3.11 VENV=/opt/rayhf/.venv sh requirements/setup.sh

ENV PATH="/opt/rayhf/.venv/bin:$PATH"
WORKDIR /work
CMD ["rayhf", "--help"]

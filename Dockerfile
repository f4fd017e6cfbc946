# CPU only. Builds and verifies without a network once the checkpoint is there: docs/ci.md.
FROM python:3.11.15-slim-bookworm

# libgomp1: llama.cpp (xllamacpp) and sentencepiece. The distribution of a pinned image has one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

# On Linux PyPI's torch brings gigabytes of CUDA that nothing here uses.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/packlight
# What is large comes first and by itself: a changed line of packlight installs no torch again.
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY compress compress
COPY exporters exporters
COPY packlight packlight
COPY recipes recipes
RUN pip install --no-deps . \
    && rm -rf build ./*.egg-info

# Downloads, statistics and compiled kernels; writable for whatever --user says.
ENV HF_HOME=/var/cache/packlight/huggingface \
    PACKLIGHT_CACHE=/var/cache/packlight/work \
    NUMBA_CACHE_DIR=/var/cache/packlight/numba
RUN useradd --create-home --uid 1000 packlight \
    && install --directory --owner packlight --mode 0777 /var/cache/packlight /work

USER 1000
WORKDIR /work

# All three formats, built, run and compared: an image whose runtimes do not work is not made. What
# stays of it are the compiled kernels (for another CPU numba compiles them again).
RUN packlight demo --output /tmp/demo --quiet \
    && rm -rf /tmp/demo \
    && chmod -R a+rwX /var/cache/packlight

ENTRYPOINT ["packlight"]
CMD ["--help"]

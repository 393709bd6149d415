# segpipe in a container, for CPUs or GPUs, whatever its user id, with a read-only root and all caches under /cache.
#   docker build --build-arg TORCH_INDEX=URL -t segpipe:cpu .
# TORCH_INDEX: the index with torch's builds for your device (PyTorch has one for CPUs and one for each CUDA); without it
# pip takes what its own index has. The CUDA libraries come with torch; the host brings the driver and nvidia's runtime.
FROM python:3.11-slim
ARG TORCH_INDEX=""
ARG EXTRAS="jobqueue"

# Users without a name, as Kubernetes has them, still have a home and a name to those who ask for one.
ENV HOME=/cache USER=segpipe LOGNAME=segpipe TMPDIR=/cache XDG_CACHE_HOME=/cache/xdg MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor DASK_TEMPORARY_DIRECTORY=/cache/dask \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
WORKDIR /segpipe
COPY constraints.txt ./
RUN mkdir -p -m 1777 /cache \
    && TORCH=$(grep '^torch==' constraints.txt) \
    && if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" "$TORCH"; fi
COPY . .
RUN pip install --constraint constraints.txt ".[$EXTRAS]" && rm -rf /cache/* build *.egg-info

USER 10001:10001
WORKDIR /cache
ENTRYPOINT ["segpipe"]
CMD ["--help"]

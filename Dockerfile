# An image with worldflux, its suites (DeepMind Control, Atari) and everything that renders without a display.
#
#   docker build -t worldflux .                              # runs on NVIDIA GPUs, and without one
#   docker build -t worldflux:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     # smaller, CPU only
#
#   docker run --rm -it -v "$PWD/runs:/workspace/runs" worldflux:cpu train dreamerv3:tiny CartPole-v1
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD/runs:/workspace/runs" worldflux train dreamerv3:size12m dmc/walker-walk
#
# Arguments go to the `worldflux` command. `--entrypoint python` runs your own script.
FROM python:3.12-slim

# gcc compiles the kernels for the CPU, and torch.compile needs it too; the other packages are OpenGL without a display
# (MuJoCo) and libraries of opencv-python.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc libc6-dev libegl1 libgl1 libgl1-mesa-dri libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# torch is by far the largest package. In a layer of its own, it stays cached when the code changes.
ARG TORCH_INDEX=""
COPY constraints.txt /opt/constraints.txt
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c /opt/constraints.txt torch

COPY . /opt/worldflux
RUN pip install -c /opt/constraints.txt "/opt/worldflux[extra,dmc,atari,zoo]"

WORKDIR /workspace
ENTRYPOINT ["worldflux"]
CMD ["--help"]

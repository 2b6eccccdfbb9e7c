# An image with dit_accel, its command line and its models, from the wheels in dist/:
#
#     for project in . models models_long; do python -m build --wheel --outdir dist $project; done
#     docker build -t dit-accel .
#     docker run --gpus all -v "$PWD/outputs:/outputs" dit-accel generate --prompt "..." --out /outputs/clip.mp4
FROM python:3.11-slim

# torch.compile and Triton call a C compiler at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY constraints.txt dist/*.whl /tmp/
# A wheel's name holds its version: the shell finds it, and pip wants the extras behind it.
RUN wheel=$(ls /tmp/dit_accel-*.whl) \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "${wheel}[cli,compile]" /tmp/dit_accel_models*.whl \
    && rm /tmp/*.whl /tmp/constraints.txt

# Nobody needs to be root to use a GPU.
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["dit-accel"]
CMD ["info"]

# For CPUs:   docker build -t clipcap .
# For a GPU:  docker build -t clipcap --build-arg EXTRAS=gpu .    then run with --gpus all
# The demo:   docker run --rm -v "$PWD:/mnt" clipcap train --config=shapes --workdir=runs/shapes
# Whatever it writes lies in /mnt; with --user "$(id -u):$(id -g)" it is yours.
FROM python:3.12-slim

# Extras of setup.cfg, such as gpu or gpu,gcs. That of the GPU brings CUDA; the machine has the driver.
ARG EXTRAS=""

COPY . /source
RUN pip install --no-cache-dir "/source${EXTRAS:+[$EXTRAS]}" && rm -r /source

# Caches of compiled programs and of weights lie there too, and so outlive the container.
ENV HOME=/mnt
WORKDIR /mnt
ENTRYPOINT ["clipcap"]
CMD ["--help"]

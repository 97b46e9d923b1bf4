#!/bin/sh
# Pins the packages of the images in deploy/requirements-cpu.txt and deploy/requirements-gpu.txt: the
# newest versions that fit pyproject.toml, with the hashes of their files. pip installs no other files.
# clients/examples/requirements.txt and deploy/routers/requirements.txt pin what the examples need, and
# the routers that the tests start, in the same way.
# `make lock` runs this script.
set -eu

cd "$(dirname "$0")/.."
uv=${UV:-uv}
eval "$(grep '^torch_cpu' deploy/install.sh)" # PyTorch's CPU build, and its index

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The images build saccade-client themselves.
resolve() {
    "$uv" pip compile --quiet --no-header --no-annotate --generate-hashes \
        --python-platform x86_64-manylinux_2_28 --index-strategy unsafe-best-match \
        --extra video --extra replicas --no-emit-package saccade-client ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
        pyproject.toml "$@"
}

# torchaudio and torchcodec are left out, as in install.sh: they are CUDA builds.
resolve_cpu() {
    echo "$torch_cpu" | resolve --extra cpu --python-version 3.11 --constraint - "$@" \
        --no-emit-package torchaudio --no-emit-package torchcodec
}
{
    echo "# Written by \`make lock\`: all that is in the cpu image besides Saccade itself."
    resolve_cpu 2>/dev/null || resolve_cpu --extra-index-url "$torch_cpu_index"
} >"$scratch/requirements-cpu.txt"

# vLLM's image has Python 3.12, vLLM and its dependencies. Only Saccade's other dependencies are
# pinned, at versions that vLLM accepts.
resolve --extra gpu --python-version 3.12 >"$scratch/all.txt"
{
    echo "# Written by \`make lock\`: what Saccade needs besides vLLM."
    resolve --python-version 3.12 --constraint "$scratch/all.txt"
} >"$scratch/requirements-gpu.txt"

{
    echo "# Written by \`make lock\` from requirements.in: what the examples and their tests need."
    "$uv" pip compile --quiet --no-header --no-annotate --generate-hashes \
        --universal --python-version 3.11 clients/examples/requirements.in
} >"$scratch/examples.txt"

{
    echo "# Written by \`make lock\` from requirements.in: the routers that the tests start."
    "$uv" pip compile --quiet --no-header --no-annotate --generate-hashes \
        --universal --python-version 3.11 deploy/routers/requirements.in
} >"$scratch/routers.txt"

mv "$scratch"/requirements-*.txt deploy/
mv "$scratch/routers.txt" deploy/routers/requirements.txt
mv "$scratch/examples.txt" clients/examples/requirements.txt

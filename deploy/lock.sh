#!/bin/sh
# Pins what the images install, in deploy/requirements-cpu.txt and deploy/requirements-gpu.txt: the
# newest versions that fit pyproject.toml, with the hashes of their files: pip installs no other ones.
# `make lock` runs it.
set -eu

cd "$(dirname "$0")/.."
uv=${UV:-uv}
eval "$(grep '^torch_cpu' deploy/install.sh)" # PyTorch's CPU build, and the index that has it

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

resolve() {
    "$uv" pip compile --quiet --no-header --no-annotate --generate-hashes \
        --python-platform x86_64-manylinux_2_28 --index-strategy unsafe-best-match \
        ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} pyproject.toml "$@"
}

# Torch's audio and video are left out as in install.sh: they are CUDA builds.
resolve_cpu() {
    echo "$torch_cpu" | resolve --extra cpu --python-version 3.11 --constraint - "$@" \
        --no-emit-package torchaudio --no-emit-package torchcodec
}
{
    echo "# Written by \`make lock\`: all that is in the cpu image besides Saccade itself."
    resolve_cpu 2>/dev/null || resolve_cpu --extra-index-url "$torch_cpu_index"
} >"$scratch/requirements-cpu.txt"

# vLLM and what it needs are in its image, with Python 3.12. Pinned is what Saccade asks for by
# itself, at versions that vLLM takes.
resolve --extra gpu --python-version 3.12 >"$scratch/all.txt"
{
    echo "# Written by \`make lock\`: what Saccade needs besides vLLM."
    resolve --python-version 3.12 --constraint "$scratch/all.txt"
} >"$scratch/requirements-gpu.txt"

mv "$scratch"/requirements-*.txt deploy/

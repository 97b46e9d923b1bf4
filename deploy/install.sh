#!/bin/sh
# Installs Saccade and its dependencies into a virtual environment: deploy/install.sh [DIR [EXTRAS]]
# Besides EXTRAS (default: dev), it installs `video`, and `gpu` if an NVIDIA driver is present, otherwise `cpu`.
# With LOCK=FILE it installs the packages that FILE pins for a CPU, without Saccade itself.
set -eu

venv=${1:-.venv}
extras=${2-dev}
python=${PYTHON:-python3}
torch_cpu='torch==2.13.0+cpu'
torch_cpu_index='https://download.pytorch.org/whl/cpu'

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Saccade needs Python 3.11 or later; $python is $("$python" --version 2>&1)." >&2
    echo "Choose another one with PYTHON=..." >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ -z "${LOCK:-}" ] && [ -e /proc/driver/nvidia/version ]; then
    pip install --quiet --editable clients/python --editable ".[gpu,video${extras:+,$extras}]"
    exit 0
fi

# PyTorch's CPU build is not on the package index that pip uses by default. Use its own index
# only if pip does not find the build without it.
index=
if ! pip install --quiet --dry-run --no-deps "$torch_cpu" >/dev/null 2>&1; then
    index="--extra-index-url $torch_cpu_index"
fi
if [ -n "${LOCK:-}" ]; then
    # shellcheck disable=SC2086 # an empty $index must expand to no argument
    pip install --quiet --no-deps $index --requirement "$LOCK"
    exit 0
fi
# shellcheck disable=SC2086
pip install --quiet $index "$torch_cpu"
# shellcheck disable=SC2086
pip install --quiet $index --editable clients/python --editable ".[cpu,video${extras:+,$extras}]"

# A dependency of a developer's tool, with which `import jsonschema`, and so each process of vLLM, takes
# a second longer. The tool does without it.
pip uninstall --quiet --yes rfc3987-syntax 2>/dev/null || true

# pip may install vLLM's audio and video decoders as CUDA builds, which cannot be loaded beside a CPU
# torch and break `import vllm`. Serving images needs neither.
for package in torchaudio torchcodec; do
    if ! "$venv/bin/python" -c "import $package" >/dev/null 2>&1; then
        pip uninstall --quiet --yes "$package" 2>/dev/null || true
    fi
done

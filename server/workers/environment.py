"""The environment variables that processes for untrusted files get: none with a secret.

Their memory is what an exploited decoder can read, so variables are passed by a list of what
libraries need, not withheld by a list of what is secret. The server itself starts with these only
where such processes are forked from it (`server.clean_start`).
"""

import os
import re
import sys
import tempfile
from collections.abc import Mapping

_NAMES = frozenset(
    (
        "COLUMNS",
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
        "FORCE_COLOR",
        "GLIBC_TUNABLES",
        "HOME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "LOGNAME",
        "NO_COLOR",
        "PATH",
        "TEMP",
        "TERM",
        "TMP",
        "TMPDIR",
        "TOKENIZERS_PARALLELISM",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
        "_SACCADE_PLUGIN",
    )
)
# The variables of Python and of libraries that decode and preprocess.
_PREFIXES = (
    "ATEN_",
    "COVERAGE_",
    "DNNL_",
    "GOMP_",
    "HF_",
    "KMP_",
    "LC_",
    "MALLOC_",
    "MKL_",
    "NPY_",
    "NUMBA_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "OPENCV_",
    "PROTOCOL_BUFFERS_",
    "PYTHON",
    "PYTORCH_",
    "RAYON_",
    "TORCH",
    "TRANSFORMERS_",
    "VLLM_",
    "XDG_",
)
_SECRET = re.compile(r"(?:^|_)(?:AUTH|CREDENTIALS?|KEYS?|PASS|PASSWORD|SECRETS?|TOKENS?)(?:_|$)")


# Variables of the Hugging Face library for its token: a place and a switch. It reads them when it
# is imported, and a process for untrusted files gets other values.
_OF_HUB = frozenset({"HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"})
_NO_TOKEN = {"HF_TOKEN_PATH": "/dev/null", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
# What else libraries read when they are imported, or when a program begins, and may matter to the
# server: certificates, switches, and the places of files.
_READ_AT_START = frozenset(
    (
        "CC",
        "CXX",
        "DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
        "HUGGINGFACE_ASSETS_CACHE",
        "HUGGINGFACE_CO_STAGING",
        "HUGGINGFACE_HUB_CACHE",
        "LD_AUDIT",
        "LD_BIND_NOW",
        "OPENSSL_CONF",
        "OPENSSL_FORCE_FIPS_MODE",
        "OPENSSL_MODULES",
        "OTEL_PROPAGATORS",
        "OTEL_PYTHON_CONTEXT",
        "SSLKEYLOGFILE",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        "THP_MEM_ALLOC_ENABLE",
    )
)
_PREFIXES_AT_START = (
    "GRPC_",
    "KINETO_",
    "MIMALLOC_",
    "MKLDNN_",
    "NUMPY_",
    "PILLOW_",
    "PROMETHEUS_",
    "PYDANTIC_",
    "RAY_",
    "RUST_",
    "TCMALLOC_",
    "TRITON_",
)
_LIMIT_OF_SPANS = re.compile(r"OTEL_(?:[A-Z]+_)*LIMIT")
# Secrets that no library reads when it is imported.
_READ_LATER = frozenset({"HF_TOKEN", "VLLM_API_KEY"})


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of the server's `variables` that a process for untrusted files gets."""
    kept = {name: value for name, value in variables.items() if _is_passed(name, value)}
    # The Hugging Face library would otherwise read the token that `hf auth login` has stored.
    return kept | _NO_TOKEN


def for_imports(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Those of the server's `variables` that it needs to import its libraries. None if a variable
    may be secret that a library may read when it is imported."""
    kept = {}
    for name, value in variables.items():
        if name in _OF_HUB or _is_passed(name, value) or _is_read_at_start(name, value):
            kept[name] = value
        elif name.startswith(_PREFIXES) and name not in _READ_LATER:
            return None
    return kept


def become_without_secrets(variables: Mapping[str, str]) -> None:
    """Give this process, a fork for untrusted files, the environment `variables`, which
    `without_secrets` has returned."""
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # it is one of the variables
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        vars(constants).update({**_NO_TOKEN, "HF_HUB_DISABLE_IMPLICIT_TOKEN": True})


def _is_passed(name: str, value: str) -> bool:
    if name in _NAMES:
        return True
    return name.startswith(_PREFIXES) and not _may_be_secret(name, value)


def _is_read_at_start(name: str, value: str) -> bool:
    if name in _READ_AT_START or _LIMIT_OF_SPANS.fullmatch(name):
        return True
    return name.startswith(_PREFIXES_AT_START) and not _may_be_secret(name, value)


def _may_be_secret(name: str, value: str) -> bool:
    # A URL may contain a password: scheme://user:password@host.
    has_password = "://" in value and "@" in value
    return has_password or _SECRET.search(name) is not None

"""The environment variables that processes for untrusted files get: none with a secret.

Their memory is what an exploited decoder can read, so variables are passed by a list of what
libraries need, not withheld by a list of what is secret.
"""

import re
from collections.abc import Mapping

_NAMES = frozenset(
    (
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
        "GLIBC_TUNABLES",
        "HOME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "LOGNAME",
        "PATH",
        "TEMP",
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
    "HF_",
    "KMP_",
    "LC_",
    "MALLOC_",
    "MKL_",
    "NUMBA_",
    "OMP_",
    "OPENBLAS_",
    "OPENCV_",
    "PYTHON",
    "TORCH",
    "TRANSFORMERS_",
    "VLLM_",
    "XDG_",
)
_SECRET = re.compile(r"(?:^|_)(?:AUTH|CREDENTIALS?|KEYS?|PASS|PASSWORD|SECRETS?|TOKENS?)(?:_|$)")


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of the server's `variables` that a process for untrusted files gets."""
    kept = {name: value for name, value in variables.items() if _is_passed(name, value)}
    # The Hugging Face library would otherwise read the token that `hf auth login` has stored.
    return kept | {"HF_TOKEN_PATH": "/dev/null", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}


def _is_passed(name: str, value: str) -> bool:
    if name in _NAMES:
        return True
    # A URL may contain a password: scheme://user:password@host.
    has_password = "://" in value and "@" in value
    return name.startswith(_PREFIXES) and not _SECRET.search(name) and not has_password

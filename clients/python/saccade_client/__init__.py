"""Client for Saccade and other OpenAI-compatible vision-language servers."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("saccade-client")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

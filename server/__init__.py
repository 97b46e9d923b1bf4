"""Saccade: a high-throughput inference server for vision-language models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("saccade")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

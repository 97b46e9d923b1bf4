"""All measurements for a machine with a GPU, in one command: `python -m benchmarks.gpu`."""

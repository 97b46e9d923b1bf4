"""Benchmarks that compare this server with plain vLLM on one machine."""

"""Unit tests that import vLLM, Transformers or torch. One process runs them all: see the Makefile."""

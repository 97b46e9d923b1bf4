"""Those that import vLLM, Transformers or torch, run by one process: see the Makefile."""

"""Everything of the server that touches what vLLM does not publish."""

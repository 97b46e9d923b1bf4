"""Everything that touches vLLM: no other package of the server imports it."""

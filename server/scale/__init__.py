"""Several servers as one: which of them gets a request."""

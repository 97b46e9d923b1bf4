"""From the parts of a request to encoded bytes."""

"""Loads media: from the parts of a request to encoded bytes."""

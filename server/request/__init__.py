"""A request: its context, its media parts and what it asks of them."""

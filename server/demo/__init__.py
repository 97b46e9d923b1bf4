"""The embedded demo model: its data, its training, its evaluation and its weights."""

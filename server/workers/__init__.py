"""The pool of worker processes that decode and preprocess images."""

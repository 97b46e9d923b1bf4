"""Batches: requests in a file, which are answered in the background.

    file -> lines -> items, each with a turn of admission -> results, an append-only log -> files

A batch survives the end of the server at any moment: its record, its input and its results are on
the disk, and each result is written once. `store` has the records, `runner` the life of a batch.
"""

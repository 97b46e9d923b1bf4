"""Hostile and odd image files, made on the fly, and what the server has to answer to each.

Nothing is stored: a case makes its bytes from a seed, with writers that let every field be wrong.
`cases` says what a case is, `make` collects them, `python -m tests.corpus FOLDER` writes them out.
"""

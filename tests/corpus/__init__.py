"""Hostile and unusual image files, generated on the fly, with the response expected for each.

Nothing is stored: a case makes its bytes from a seed, with writers that let every field be wrong.
`cases` says what a case is, `make` collects them, `python -m tests.corpus FOLDER` writes them out.
"""

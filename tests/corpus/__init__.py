"""Hostile and unusual image files, generated on the fly, with the response expected for each.

Nothing is stored: a case makes its bytes from a seed, with writers that can set any field wrong.
`cases` defines cases, `make` collects them, `python -m tests.corpus FOLDER` writes the files.
"""

"""Writers of image files that let everything be wrong; each knows one format and no case."""

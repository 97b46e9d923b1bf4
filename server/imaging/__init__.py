"""Image files: their headers and limits, decoding to upright pictures, and their cost in tokens."""

"""Image files: headers, limits, decoding to upright pictures, and cost in tokens."""

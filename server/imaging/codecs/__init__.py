"""One decoder for each format: the fastest correct one of those measured.

    JPEG   TurboJPEG: straight from the DCT coefficients at 1/2, 1/4 or 1/8; reports damage
    PNG    libdeflate and compiled filters; Pillow for 16 bits and interlaced files
    WebP   OpenCV's libwebp; libvips where the picture may shrink, which libwebp does while decoding
    HEIF   libheif
    rest   Pillow: GIF, BMP, TIFF, AVIF, and the frames of animations

Large PNG, TIFF and WebP files are streamed through libvips, so that memory holds the reduced
picture and not the whole one. Every decoder returns the picture as it is stored; `imaging.convert`
changes its colours and turns it.
"""

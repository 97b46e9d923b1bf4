"""One decoder for each format: the fastest correct one of those that were measured.

    JPEG   TurboJPEG: straight from the DCT coefficients at 1/2, 1/4 or 1/8; reports damage
    PNG    libdeflate and compiled filters; Pillow for 16 bits and interlaced files
    WebP   OpenCV's libwebp; libvips for large pictures, which it shrinks while decoding
    HEIF   libheif
    others Pillow: GIF, BMP, TIFF, AVIF, and frames of animations

libvips streams large PNG, TIFF and WebP files, so that memory holds only the reduced picture. Every
decoder returns the picture as it is stored; `imaging.convert` changes its colours and turns it.
"""

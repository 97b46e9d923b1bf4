"""One decoder for each format, and each the fastest right one that was measured.

    JPEG   TurboJPEG: straight from the DCT coefficients at 1/2, 1/4 or 1/8; tells damage
    PNG    libdeflate and compiled filters; Pillow for 16 bits and interlaced files
    WebP   OpenCV's libwebp; libvips where it may shrink, which libwebp then does as it decodes
    HEIF   libheif
    rest   Pillow: GIF, BMP, TIFF, AVIF, and the frames of animations

Large PNG, TIFF and WebP files are streamed through libvips, so that memory holds the reduced
picture and not the whole one. What each of them returns is the picture as it is stored: `colour`
and `upright` make the same of it whichever decoder it came from.
"""

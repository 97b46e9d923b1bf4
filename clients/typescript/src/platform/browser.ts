import type { Bytes } from "../bytes.js";
import { UnusableMedia } from "../errors.js";
import type { Format, Size } from "../format.js";

export async function read(path: string | URL): Promise<Bytes> {
  throw new UnusableMedia(`"${path}" is a path, and a page has no files: pass a File or a URL`);
}

export async function canResize(): Promise<boolean> {
  return typeof OffscreenCanvas !== "undefined" && typeof createImageBitmap !== "undefined";
}

export async function resized(
  data: Bytes,
  format: Format,
  target: Size,
  quality: number,
): Promise<Bytes | undefined> {
  let bitmap: ImageBitmap | undefined;
  try {
    bitmap = await createImageBitmap(new Blob([data], { type: format.mediaType }));
    if (bitmap.width !== format.size?.[0] || bitmap.height !== format.size[1]) return undefined;
    const canvas = shrunk(bitmap, target);
    const isPhoto = format.isLossy && (format.mediaType === "image/jpeg" || isOpaque(canvas));
    const file = await canvas.convertToBlob(
      isPhoto ? { type: "image/jpeg", quality: quality / 100 } : { type: "image/png" },
    );
    return new Uint8Array(await file.arrayBuffer());
  } catch {
    return undefined; // damaged, in a format that this browser cannot read, or too large for it
  } finally {
    bitmap?.close();
  }
}

/** Browsers differ in how well they shrink by large factors, but not in halving. */
function shrunk(bitmap: ImageBitmap, [width, height]: Size): OffscreenCanvas {
  let from: ImageBitmap | OffscreenCanvas = bitmap;
  for (;;) {
    const next = [Math.ceil(from.width / 2), Math.ceil(from.height / 2)] as const;
    if (next[0] < width || next[1] < height) return drawn(from, [width, height]);
    from = drawn(from, next);
  }
}

function drawn(from: CanvasImageSource, [width, height]: Size): OffscreenCanvas {
  const canvas = new OffscreenCanvas(width, height);
  const pen = canvas.getContext("2d")!;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(from, 0, 0, width, height);
  return canvas;
}

function isOpaque(canvas: OffscreenCanvas): boolean {
  const { data } = canvas.getContext("2d")!.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 3; at < data.length; at += 4) if (data[at] !== 255) return false;
  return true;
}

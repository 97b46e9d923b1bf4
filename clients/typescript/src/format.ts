// What the first bytes of a picture tell.
import { imageSize } from "image-size";

import { ascii, has, type Bytes } from "./bytes.js";

/** Width and height in pixels. */
export type Size = readonly [number, number];

export interface Format {
  mediaType: string;
  /** Upright; undefined if it is unknown. */
  size?: Size;
  /** Whether it can be resized without harm: a single picture of 8 bits, in RGB or grey. */
  isPlain: boolean;
  /** Whether its compression may be lossy. */
  isLossy: boolean;
}

const MEDIA_TYPES: Record<string, string> = {
  jpg: "image/jpeg",
  heif: "image/heic",
  heic: "image/heic",
};
const KNOWN = new Set(["avif", "bmp", "gif", "jpg", "heic", "heif", "png", "tiff", "webp"]);
const FIRST_TURNED = 5; // of the orientations of EXIF, 5 to 8 swap width and height

export function formatOf(data: Bytes): Format {
  let found: ReturnType<typeof imageSize>;
  try {
    found = imageSize(data);
  } catch {
    return { mediaType: "application/octet-stream", isPlain: false, isLossy: false };
  }
  const { width, height, orientation = 1, type = "" } = found;
  const mediaType = KNOWN.has(type)
    ? (MEDIA_TYPES[type] ?? `image/${type}`)
    : "application/octet-stream";
  return {
    mediaType,
    size: orientation >= FIRST_TURNED ? [height, width] : [width, height],
    isPlain: isPlain(data, type),
    isLossy: type === "jpg" || type === "avif" || (type === "webp" && !has(data, "VP8L", 12)),
  };
}

function isPlain(data: Bytes, type: string): boolean {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  try {
    if (type === "png") return isPlainPng(data, view);
    if (type === "jpg") return isPlainJpeg(view);
  } catch (error) {
    if (error instanceof RangeError) return false; // the file ends too early
    throw error;
  }
  if (type === "webp") return !has(data, "VP8X", 12) || (data[20]! & ANIMATED) === 0;
  return type === "avif" && has(data, "avif", 8); // a sequence has the brand `avis`
}

const ANIMATED = 0x02;

function isPlainPng(data: Bytes, view: DataView): boolean {
  const bitsPerSample = view.getUint8(24);
  for (let at = 8; ; at += 12 + view.getUint32(at)) {
    const name = ascii(data, at + 4, at + 8);
    if (name === "acTL") return false; // animated
    if (name === "IDAT") return bitsPerSample <= 8;
  }
}

function isPlainJpeg(view: DataView): boolean {
  for (let at = 2; ;) {
    const marker = view.getUint8(at + 1);
    // Frame headers, without the tables (DHT, JPG, DAC) among their numbers.
    const isFrame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
    if (isFrame) return view.getUint8(at + 4) === 8 && [1, 3].includes(view.getUint8(at + 9));
    if (marker === 0xff)
      at += 1; // a fill byte
    else at += 2 + view.getUint16(at + 2);
  }
}

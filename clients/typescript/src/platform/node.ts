import { readFile } from "node:fs/promises";

import type { Bytes } from "../bytes.js";
import { UnusableMedia } from "../errors.js";
import type { Format, Size } from "../format.js";

type Sharp = typeof import("sharp").default;

let sharp: Promise<Sharp | undefined> | undefined;

const loaded = (): Promise<Sharp | undefined> =>
  (sharp ??= import("sharp").then(
    (module) => module.default,
    () => undefined, // not installed
  ));

export async function read(path: string | URL): Promise<Bytes> {
  try {
    return new Uint8Array(await readFile(path));
  } catch (error) {
    throw new UnusableMedia(`cannot read ${path}: ${(error as Error).message}`);
  }
}

export async function canResize(): Promise<boolean> {
  return (await loaded()) !== undefined;
}

export async function resized(
  data: Bytes,
  format: Format,
  target: Size,
  quality: number,
): Promise<Bytes | undefined> {
  const open = await loaded();
  if (open === undefined) return undefined;
  try {
    const image = open(data);
    const { autoOrient, hasAlpha } = await image.metadata();
    if (autoOrient.width !== format.size?.[0] || autoOrient.height !== format.size[1])
      return undefined;
    const small = image.autoOrient().resize(...target, { fit: "fill" });
    const isPhoto = format.isLossy && !hasAlpha;
    const file = isPhoto ? small.jpeg({ quality, chromaSubsampling: "4:4:4" }) : small.png();
    return new Uint8Array(await file.toBuffer());
  } catch {
    return undefined; // damaged: the server says how
  }
}

export type Bytes = Uint8Array<ArrayBuffer>;

// `String.fromCharCode` takes only so many arguments.
const CHUNK = 0x8000;

export function base64(data: Bytes): string {
  let text = "";
  for (let at = 0; at < data.length; at += CHUNK)
    text += String.fromCharCode(...data.subarray(at, at + CHUNK));
  return btoa(text);
}

export function dataUrl(mediaType: string, data: Bytes): string {
  return `data:${mediaType};base64,${base64(data)}`;
}

/** The SHA-256 in hexadecimal; undefined in pages without HTTPS, where browsers have none. */
export async function sha256(data: Bytes): Promise<string | undefined> {
  const subtle: SubtleCrypto | undefined = globalThis.crypto?.subtle;
  if (subtle === undefined) return undefined;
  const hash = new Uint8Array(await subtle.digest("SHA-256", data));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether the bytes at `start` are these ASCII characters. */
export function has(data: Bytes, text: string, start = 0): boolean {
  return ascii(data, start, start + text.length) === text;
}

export function ascii(data: Bytes, start: number, end: number): string {
  return String.fromCharCode(...data.subarray(start, end));
}

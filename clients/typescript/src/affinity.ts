// The key by which routers send requests about a picture to the server that has it in its caches.
//
// A hash of the conversation's first picture, PDF or video: of the file's bytes where the client
// has them, or else of the URL or the `file_id`. The Python client makes the same of the same.
import { sha256, type Bytes } from "./bytes.js";

export const SESSION = "X-Session-ID";
export const ROUTING_KEY = "X-SMG-Routing-Key";

const DIGITS = 32;
const KINDS = ["image_url", "video_url", "file"];
/** Where the part of a medium has its source, in the order in which they are tried. */
const SOURCES = ["url", "file_data", "file_id"];

/** The key of a file, of a URL, or of the name of an upload; undefined in pages without HTTPS. */
export async function keyOf(source: Bytes | string): Promise<string | undefined> {
  return (await sha256(typeof source === "string" ? bytesOf(source) : source))?.slice(0, DIGITS);
}

/** The source of a part of the API, or its `uuid` if it has one; undefined if it is no medium. */
export function sourceOf(part: object): string | undefined {
  const { type, uuid, ...more } = part as Record<string, unknown>;
  if (typeof type !== "string" || !KINDS.includes(type)) return undefined;
  const holder = more[type];
  const isObject = typeof holder === "object" && holder !== null;
  const found = isObject
    ? SOURCES.map((name) => (holder as Record<string, unknown>)[name])
    : [holder];
  return [uuid, ...found].find((each): each is string => typeof each === "string" && each !== "");
}

/** The headers with a request's key, if it has one. Those that the caller has `given` win. */
export function routingHeaders(key: string | undefined, given: object): Record<string, string> {
  const pairs = (Symbol.iterator in given ? [...(given as Headers)] : Object.entries(given)).map(
    ([name, value]) => [name.toLowerCase(), value] as const,
  );
  const named = new Map<string, unknown>(pairs);
  const text = [SESSION, ROUTING_KEY]
    .map((name) => named.get(name.toLowerCase()))
    .concat(key)
    .find((each): each is string => typeof each === "string");
  if (text === undefined) return {};
  const missing = [SESSION, ROUTING_KEY].filter((name) => !named.has(name.toLowerCase()));
  return Object.fromEntries(missing.map((name) => [name, text]));
}

/** The bytes in a data URL, or else those of the text. */
function bytesOf(text: string): Bytes {
  const payload = /^data:[^,]*;base64,(.*)$/is.exec(text)?.[1];
  if (payload !== undefined) {
    try {
      return Uint8Array.from(atob(payload), (character) => character.charCodeAt(0));
    } catch {
      // it is none
    }
  }
  return new TextEncoder().encode(text);
}

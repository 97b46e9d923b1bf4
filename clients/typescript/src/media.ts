// Pictures, documents and videos to send, from whatever the caller has.
import * as platform from "#platform";

import { ascii, has, type Bytes } from "./bytes.js";
import { UnusableMedia } from "./errors.js";
import type { Encoded } from "./prepare.js";

/** `trim` (without margins) and `salient` (a small view of the whole, and crops where there is
 * detail) only with Saccade. */
export type Detail = "auto" | "low" | "high" | "trim" | "salient";

/**
 * A file: its bytes, a URL, which the server fetches, or in Node its path or `file:` URL object.
 */
export type Source = string | URL | Blob | ArrayBuffer | Uint8Array;

/** Whatever can be sent: a file whose kind is found out, or one with options. */
export type MediaSource = Source | Medium;

export interface PictureOptions {
  detail?: Detail;
  /** A cap on the picture's tokens. Only with Saccade. */
  max_tokens?: number;
  /** Frames of an animation: how many, or which, from 0. Only with Saccade. */
  frames?: number | readonly number[];
}

/** A file to send, or the `file_id` of an upload in its place. */
abstract class File {
  #content: Promise<Bytes | string> | undefined;

  constructor(
    readonly source: Source | undefined,
    readonly file_id?: string,
  ) {}

  /** The bytes of the file, the URL from which the server gets it, or undefined for an upload. */
  async content(): Promise<Bytes | string | undefined> {
    if (this.source === undefined) return undefined;
    this.#content ??= load(this.source);
    try {
      return await this.#content;
    } catch (error) {
      this.#content = undefined; // the file may be there the next time
      throw error;
    }
  }
}

/** A picture, and how much the model is to see of it. */
export class Picture extends File {
  /** As it was sent, by size and quality. @internal */
  readonly files = new Map<string, Promise<Encoded>>();

  constructor(
    source: Source | undefined,
    readonly options: PictureOptions = {},
    file_id?: string,
  ) {
    super(source, file_id);
  }
}

/** A PDF. `pages` selects pages, such as "1-3,7". */
export class Pdf extends File {
  constructor(
    source: Source | undefined,
    readonly pages?: string,
    file_id?: string,
    readonly name = nameOf(source) ?? "document.pdf",
  ) {
    super(source, file_id);
  }
}

/** A video, and its media type. */
export class Video extends File {
  constructor(
    source: Source,
    readonly mediaType: string,
  ) {
    super(source);
  }
}

export type Medium = Picture | Pdf | Video;

/** A picture with options. */
export function picture(source: Source | Picture, options: PictureOptions = {}): Picture {
  return source instanceof Picture
    ? new Picture(source.source, options, source.file_id)
    : new Picture(source, options);
}

/** A PDF, of which `pages` selects pages, such as "1-3,7". Only Saccade takes `pages`. */
export function pdf(source: Source, options: { pages?: string } = {}): Pdf {
  return new Pdf(source, options.pages);
}

/** A video. Its media type is guessed from its name. */
export function video(source: Source, options: { mediaType?: string } = {}): Video {
  return new Video(source, options.mediaType ?? videoTypeOfName(source) ?? "video/mp4");
}

/** What `source` is: a PDF or a video by its name or first bytes, or else a picture. */
export async function media(source: MediaSource): Promise<Medium> {
  if (isMedium(source)) return source;
  const videoType = videoTypeOfName(source);
  if (videoType !== undefined) return new Video(source, videoType);
  const made = new Picture(source);
  const content = await made.content();
  if (content instanceof Uint8Array) {
    if (ascii(content, 0, 1024).includes("%PDF-"))
      return new Pdf(content, undefined, undefined, nameOf(source));
    const type = videoTypeOf(content);
    if (type !== undefined) return new Video(content, type);
  }
  return made;
}

export function isMedium(value: unknown): value is Medium {
  return value instanceof File;
}

const VIDEO_TYPES: Record<string, string> = {
  mp4: "video/mp4",
  m4v: "video/mp4",
  mov: "video/quicktime",
  mkv: "video/x-matroska",
  webm: "video/webm",
  avi: "video/x-msvideo",
};

function videoTypeOfName(source: Source): string | undefined {
  const suffix = /\.(\w+)$/.exec(nameOf(source) ?? "")?.[1];
  return suffix === undefined ? undefined : VIDEO_TYPES[suffix.toLowerCase()];
}

function videoTypeOf(data: Bytes): string | undefined {
  const isMp4 = ["iso", "mp4", "avc", "M4V", "qt "].some((brand) => has(data, brand, 8));
  if (has(data, "ftyp", 4) && isMp4) return "video/mp4";
  if (has(data, "\x1a\x45\xdf\xa3")) return "video/x-matroska";
  if (has(data, "RIFF") && has(data, "AVI ", 8)) return "video/x-msvideo";
  return undefined;
}

/** The last part of a path, a URL, or a file's name. */
function nameOf(source: Source | undefined): string | undefined {
  if (source instanceof Blob) return "name" in source ? String(source.name) : undefined;
  if (typeof source !== "string" && !(source instanceof URL)) return undefined;
  const text = String(source);
  if (text.startsWith("data:") || text.startsWith("blob:")) return undefined;
  const path = URL.canParse(text) ? new URL(text).pathname : text;
  return path.split(/[\\/]/).at(-1);
}

const FETCHED_BY_SERVER = /^(https?|data|file):/i;

async function load(source: Source): Promise<Bytes | string> {
  if (source instanceof Blob) return new Uint8Array(await source.arrayBuffer());
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (source instanceof Uint8Array) return new Uint8Array(source);
  if (typeof source !== "string" && !(source instanceof URL))
    throw new UnusableMedia("a picture is a path, a URL, a Blob or the bytes of a file");
  const url = String(source);
  if (url.startsWith("blob:")) return new Uint8Array(await (await fetch(url)).arrayBuffer());
  const isLocal = source instanceof URL && source.protocol === "file:";
  return FETCHED_BY_SERVER.test(url) && !isLocal ? url : await platform.read(source);
}

// From messages with pictures to the messages that are sent.
//
// media loaded -> sizes -> the server's costs -> resized where the model sees no more -> parts
import type OpenAI from "openai";

import * as ours from "#platform";

import { keyOf, sourceOf } from "./affinity.js";
import type { Grounded, Region, ShownImage } from "./answers.js";
import { dataUrl, sha256, type Bytes } from "./bytes.js";
import { UnusableMedia } from "./errors.js";
import { formatOf, type Format, type Size } from "./format.js";
import { isMedium, media, Pdf, Picture, Video, type MediaSource, type Medium } from "./media.js";
import type { Platform } from "./platform/platform.js";
import type { Asked, Targets } from "./targets.js";

const platform: Platform = ours;

/** A part of a message's content: a text, a medium, or a part of the API. */
export type ContentItem = MediaSource | OpenAI.ChatCompletionContentPart;

/** A message of the API, whose content may also be a list of texts, media and parts. */
export type Message =
  | OpenAI.ChatCompletionMessageParam
  | { role: "user"; content: readonly ContentItem[]; name?: string };

type Part = Record<string, unknown>;

/** A picture as it is sent: its file, the caller's size and the size sent, if they are known. */
export interface Encoded {
  data: Bytes;
  mediaType: string;
  size: Size | undefined;
  sentSize: Size | undefined;
  /** Names these bytes towards the server; undefined in pages without HTTPS. */
  name: string | undefined;
}

interface Placed {
  /** The list of parts that has the medium, and its index in it. */
  parts: unknown[];
  at: number;
  medium: Medium;
  content: Bytes | string | undefined;
  encoded?: Encoded;
}

/** Messages that are ready to be sent, but for the pictures that the server has already. */
export class Prepared {
  readonly messages: OpenAI.ChatCompletionMessageParam[] = [];
  readonly placed: Placed[] = [];
  /** By which routers send a conversation to one server. */
  session: string | undefined;

  constructor(readonly isSaccade: boolean) {}

  /** Names of the pictures that have bytes and are one image to the model. */
  names(): Set<string> {
    const named = this.placed.filter(({ medium }) => !isSeveral(medium));
    return new Set(named.flatMap(({ encoded }) => encoded?.name ?? []));
  }

  /**
   * The messages as they are sent. Pictures in `names` are sent with their names, those in `known`
   * without their data.
   */
  written(
    names: ReadonlySet<string> = new Set(),
    known: ReadonlySet<string> = new Set(),
  ): OpenAI.ChatCompletionMessageParam[] {
    for (const placed of this.placed) {
      const name = placed.encoded?.name ?? "";
      const part = partOf(placed, names.has(name) ? name : undefined, known.has(name));
      placed.parts[placed.at] = this.isSaccade ? part : ofOtherServers(part, placed.medium);
    }
    return this.messages;
  }

  /** The server's `details` (undefined: it sends none), in pixels of the caller's pictures. */
  images(details: readonly ShownImage[] | undefined): ShownImage[] {
    const pictures = this.placed.filter(({ medium }) => !(medium instanceof Video));
    if (details === undefined) {
      const sizes = pictures.flatMap(({ encoded }) => (encoded?.size ? [encoded.size] : []));
      return sizes.length === pictures.length ? sizes.map(whole) : [];
    }
    const singles = pictures.filter(({ medium }) => !isSeveral(medium)).length;
    const found: ShownImage[] = [];
    for (const { medium, encoded } of pictures) {
      const count = isSeveral(medium) ? details.length - singles : 1;
      const shown = details.slice(found.length, found.length + count);
      found.push(...shown.map((each) => inOriginal(each, encoded)));
    }
    return [...found, ...details.slice(found.length)];
  }
}

export interface PrepareOptions {
  isSaccade: boolean;
  /** Finds the sizes to send; undefined if pictures are to keep theirs. */
  targets: Targets | undefined;
  quality: number;
  /** The request's budget for the tokens of all pictures. */
  budget: number | undefined;
  signal: AbortSignal | undefined;
}

/** Loads all media and resizes pictures to what the model sees of them. */
export async function prepare(
  messages: readonly Message[],
  options: PrepareOptions,
): Promise<Prepared> {
  const prepared = await loaded(messages, options.isSaccade);
  const pictures = prepared.placed.flatMap((placed) => {
    const { medium, content } = placed;
    if (!(medium instanceof Picture) || !(content instanceof Uint8Array)) return [];
    return [{ placed, medium, content, format: formatOf(content) }];
  });
  // Otherwise it would be unclear which detail of an answer belongs to which picture.
  const isClear =
    prepared.placed.filter(({ medium }) => isSeveral(medium)).length <= 1 &&
    !pictures.some(({ medium }) => isReduced(medium));
  const sizes = new Map<Placed, Size | undefined>();
  const { targets, budget } = options;
  const isLarge = ({ medium, content, format }: (typeof pictures)[number]): boolean =>
    content.length >= MIN_BYTES && medium.options.frames === undefined && format.isPlain;
  if (targets && isClear && pictures.some(isLarge) && (await platform.canResize())) {
    const asked = pictures.filter((each) => {
      const { size, isPlain } = each.format;
      return size && isPlain && (budget !== undefined || isLarge(each));
    });
    // A budget is shared out among all pictures, so all sizes must be known.
    if (budget === undefined || asked.length === prepared.placed.length) {
      const found = await targets.of(asked.map(askedOf), budget, options.signal);
      asked.forEach(({ placed }, index) => sizes.set(placed, found[index]));
    }
  }
  for (const { placed, medium, content, format } of pictures)
    placed.encoded = await encoded(medium, content, format, sizes.get(placed), options.quality);
  return prepared;
}

/** Size and options of a picture, by which the server tells what it costs. */
export function askedOf(picture: { medium: Picture; format: Format }): Asked {
  const { detail, max_tokens } = picture.medium.options;
  return { size: picture.format.size!, detail, max_tokens };
}

/** Smaller files are sent as they are: asking would take longer. */
const MIN_BYTES = 64 * 1024;

/** Copies of the messages, with the media of their contents read. */
async function loaded(messages: readonly Message[], isSaccade: boolean): Promise<Prepared> {
  const prepared = new Prepared(isSaccade);
  let first: Bytes | string | undefined;
  for (const message of messages) {
    const { content } = message;
    if (!Array.isArray(content)) {
      prepared.messages.push({ ...message } as OpenAI.ChatCompletionMessageParam);
      continue;
    }
    const parts: unknown[] = [];
    for (const item of content as readonly ContentItem[]) {
      if (typeof item === "string") parts.push({ type: "text", text: item });
      else if (isPart(item)) {
        first ??= sourceOf(item);
        parts.push(item);
      } else {
        const medium = await media(item);
        const placed = { parts, at: parts.length, medium, content: await medium.content() };
        first ??= placed.content ?? medium.file_id ?? "";
        prepared.placed.push(placed);
        parts.push(undefined);
      }
    }
    prepared.messages.push({ ...message, content: parts } as OpenAI.ChatCompletionMessageParam);
  }
  if (first !== undefined) prepared.session = await keyOf(first);
  return prepared;
}

/** Whether an item is a part of the API, and no medium. */
export function isPart(item: ContentItem): item is OpenAI.ChatCompletionContentPart {
  return typeof item === "object" && "type" in item && !(item instanceof Blob) && !isMedium(item);
}

/** A picture keeps its files as long as it lives. */
function encoded(
  picture: Picture,
  content: Bytes,
  format: Format,
  target: Size | undefined,
  quality: number,
): Promise<Encoded> {
  const key = `${target} ${quality}`;
  let kept = picture.files.get(key);
  if (kept === undefined) {
    kept = encode(content, format, target, quality);
    picture.files.set(key, kept);
  }
  return kept;
}

async function encode(
  content: Bytes,
  format: Format,
  target: Size | undefined,
  quality: number,
): Promise<Encoded> {
  const { size, mediaType } = format;
  const small = target && (await platform.resized(content, format, target, quality));
  const sent =
    small && small.length < content.length
      ? { data: small, mediaType: formatOf(small).mediaType, size, sentSize: target }
      : { data: content, mediaType, size, sentSize: size };
  const hash = await sha256(sent.data);
  return { ...sent, name: hash && `sha256-${hash}` };
}

/** The part of a message. A picture that the server knows has its name and no data. */
function partOf({ medium, content, encoded }: Placed, name?: string, isKnown = false): Part {
  if (medium instanceof Pdf) {
    const file =
      content instanceof Uint8Array
        ? { filename: medium.name, file_data: dataUrl("application/pdf", content) }
        : medium.file_id !== undefined
          ? { file_id: medium.file_id }
          : { filename: medium.name, file_data: content };
    return { type: "file", file, ...(medium.pages ? { pages: medium.pages } : {}) };
  }
  if (medium instanceof Video) {
    const url = content instanceof Uint8Array ? dataUrl(medium.mediaType, content) : content;
    return { type: "video_url", video_url: { url } };
  }
  const image: Part = { ...medium.options };
  if (medium.file_id !== undefined) image["file_id"] = medium.file_id;
  else if (typeof content === "string") image["url"] = content;
  else if (encoded && !isKnown) image["url"] = dataUrl(encoded.mediaType, encoded.data);
  return { type: "image_url", image_url: image, ...(name ? { uuid: name } : {}) };
}

/** The part without the options that only Saccade takes. */
function ofOtherServers(part: Part, medium: Medium): Part {
  if (medium instanceof Pdf && medium.pages !== undefined)
    throw new UnusableMedia("only Saccade selects pages of a PDF");
  if (!(medium instanceof Picture)) return part;
  const { max_tokens: _, frames: __, detail, ...image } = part["image_url"] as Part;
  const others = detail === undefined || isReduced(medium) ? {} : { detail };
  return { ...part, image_url: { ...image, ...others } };
}

/** Whether the medium may be several images to the model. */
function isSeveral(medium: Medium): boolean {
  return (
    medium instanceof Pdf ||
    (medium instanceof Picture &&
      (medium.options.frames !== undefined || medium.options.detail === "salient"))
  );
}

/** Whether the server chooses what the model sees, of all the detail that there is. */
function isReduced({ options: { detail } }: Picture): boolean {
  return detail === "trim" || detail === "salient";
}

function whole([width, height]: Size): ShownImage {
  return { width, height, region: [0, 0, width, height] };
}

/** `shown` in pixels of the caller's picture. */
/** `places` in the pictures `sent`, in pixels of the caller's, `images`. */
export function inOriginals(
  places: readonly Grounded[] | undefined,
  sent: readonly ShownImage[],
  images: readonly ShownImage[],
): Grounded[] | undefined {
  return places?.map((place) => {
    const [from, to] = [sent[place.image], images[place.image]];
    if (from === undefined || to === undefined) return place;
    const [across, down] = [to.width / from.width, to.height / from.height];
    const { box, point, ...rest } = place;
    return {
      ...rest,
      ...(box && { box: [box[0] * across, box[1] * down, box[2] * across, box[3] * down] }),
      ...(point && { point: [point[0] * across, point[1] * down] }),
    };
  });
}

function inOriginal(shown: ShownImage, encoded: Encoded | undefined): ShownImage {
  const { size, sentSize } = encoded ?? {};
  if (!size || !sentSize || (size[0] === sentSize[0] && size[1] === sentSize[1])) return shown;
  const [width, height] = size;
  const [across, down] = [width / shown.width, height / shown.height];
  const [left, top, right, bottom] = shown.region;
  const region: Region = [left * across, top * down, right * across, bottom * down];
  return { ...shown, width, height, region };
}

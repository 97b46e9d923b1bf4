// What a person attaches to a question: pictures, PDFs, clips. They stay in the page until sent.
import { postJson } from "./api.js";

const KINDS = { pdf: /pdf$/, video: /^video\//, audio: /^audio\// };
const BY_NAME = {
  pdf: /\.pdf$/i,
  video: /\.(mp4|mov|webm|mkv)$/i,
  audio: /\.(wav|mp3|flac|ogg|m4a)$/i,
};
export const ACCEPTED = "image/*,application/pdf,video/*,audio/*,.heic,.avif,.tif,.tiff,.mkv";

let serial = 0;

/** An attachment of a file. A picture that the browser cannot show has no `width`. */
export async function attach(file, name = file.name) {
  const kind =
    Object.keys(KINDS).find((each) => KINDS[each].test(file.type)) ??
    Object.keys(BY_NAME).find((each) => BY_NAME[each].test(name ?? "")) ??
    "image";
  const made = {
    id: ++serial,
    kind,
    name: name || `${kind}-${serial}`,
    blob: file,
    url: URL.createObjectURL(file),
    pages: "",
  };
  if (kind === "image") {
    const picture = new Image();
    picture.src = made.url;
    try {
      await picture.decode();
      Object.assign(made, { width: picture.naturalWidth, height: picture.naturalHeight, picture });
    } catch {
      // HEIC, TIFF: the server can read them
    }
  }
  return made;
}

/** Give back what the browser holds for an attachment that is no longer shown. Its picture can still
 * be drawn on a canvas. */
export const release = (attachment) => URL.revokeObjectURL(attachment.url);

// Larger clips are sent once, with the question, and not before to count their tokens.
const COUNTED_BYTES = 16 << 20;

export const isSeen = (attachment) => attachment.kind === "image" || attachment.kind === "pdf";

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** `detail` and `max_tokens` of the choices, as far as they differ from the defaults. */
function options({ detail, cap }) {
  const given = {};
  if (detail !== "auto") given.detail = detail;
  if (cap) given.max_tokens = cap;
  return given;
}

/** The content part of an attachment, with `url` in the place of its data. */
export function partWith(attachment, choices, url) {
  const { kind, name, pages } = attachment;
  if (kind === "video") return { type: "video_url", video_url: { url } };
  if (kind === "audio") return { type: "audio_url", audio_url: { url } };
  if (kind === "pdf") {
    const selected = pages ? { pages } : {};
    return {
      type: "file",
      file: { filename: name, file_data: url },
      ...selected,
      ...options(choices),
    };
  }
  return { type: "image_url", image_url: { url, ...options(choices) } };
}

/** The content part of an attachment, with its data. */
export async function partOf(attachment, choices) {
  attachment.data ??= await dataUrl(attachment.blob);
  return partWith(attachment, choices, attachment.data);
}

const isCounted = (each) => each.kind === "video" && each.blob.size <= COUNTED_BYTES;

/** The answer of `/v1/images/tokens`, whose `data` is also in `rows`, a list for each attachment, and
 * whose `videos` are in `clips`. Of some models, the tokens of clips are not known in advance. */
export async function costsOf(attachments, choices, signal) {
  const clips = attachments.filter(isCounted);
  if (!clips.length) return costs(attachments.filter(isSeen), [], choices, signal);
  try {
    return await costs(attachments.filter(isSeen), clips, choices, signal);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return costs(attachments.filter(isSeen), [], choices, signal);
  }
}

async function costs(seen, clips, choices, signal) {
  if (!seen.length && !clips.length) return null;
  const body = { include_views: true };
  if (choices.budget) body.max_image_tokens = choices.budget;
  if (!clips.length && seen.every((each) => each.kind === "image" && each.width)) {
    body.images = seen.map(({ width, height }) => ({ width, height, ...options(choices) }));
  } else {
    const content = await Promise.all([...seen, ...clips].map((each) => partOf(each, choices)));
    body.messages = [{ role: "user", content }];
  }
  const answer = await postJson("v1/images/tokens", body, signal);
  answer.clips = new Map(clips.map((each, index) => [each.id, answer.videos[index]]));
  const left = [...answer.data];
  answer.rows = new Map();
  for (const each of seen) {
    const rows = [left.shift()];
    while (each.kind === "pdf" && left.length && left[0].frame > rows.at(-1).frame)
      rows.push(left.shift());
    answer.rows.set(each.id, rows);
  }
  return answer;
}

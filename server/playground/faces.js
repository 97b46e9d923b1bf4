// Small pieces of the page to ask: pictures, badges, errors.
import { hintOf, urlOf } from "./api.js";
import { h, icon, plural } from "./dom.js";

const KIND_ICONS = { image: "page", pdf: "page", video: "clip", audio: "sound" };

export const nameOf = (file) =>
  file
    .replace(/\.\w+$/, "")
    .replaceAll("-", " ")
    .replace(" first", "");

export function sampleFace(sample) {
  if (!sample.files[0].endsWith(".png")) return h("span", { class: "face" }, icon("clip"));
  return h(
    "span",
    { class: "face" },
    h("img", { src: urlOf(`playground/samples/${sample.files[0]}`), alt: "", loading: "lazy" }),
  );
}

export function preview(attachment) {
  if (attachment.width) return h("img", { src: attachment.url, alt: attachment.name });
  const { kind, blob, url, name } = attachment;
  if (kind === "video" && document.createElement("video").canPlayType(blob.type))
    return h("video", { src: url, muted: true, preload: "metadata", "aria-label": name });
  return h(
    "span",
    { class: "file" },
    icon(KIND_ICONS[attachment.kind]),
    h("span", {}, attachment.name),
  );
}

export function cacheBadge(cached) {
  const all = (value) => cached.every((each) => each === value);
  if (all("embedding"))
    return h(
      "span",
      {
        class: "badge good",
        title: "The pictures' embeddings were cached: the encoder did not run",
      },
      "embedding cached",
    );
  if (all("none"))
    return h(
      "span",
      { class: "badge", title: "The pictures were decoded and encoded" },
      "not cached",
    );
  return h(
    "span",
    { class: "badge good", title: `Per picture: ${cached.join(", ")}` },
    "partly cached",
  );
}

export function errorCard(error, again) {
  const where = [
    error.code,
    error.param,
    error.requestId && `request ${error.requestId.slice(0, 8)}`,
  ]
    .filter(Boolean)
    .join(" · ");
  const needsKey = error.status === 401;
  return h(
    "div",
    { class: "error", role: "alert" },
    h("p", {}, h("strong", {}, sentence(error.message))),
    hintOf(error) &&
      h(
        "p",
        {},
        hintOf(error),
        error.retryAfter ? ` The server suggests ${plural(error.retryAfter, "second")}.` : "",
      ),
    where && h("p", { class: "note" }, where),
    h(
      "div",
      { class: "row" },
      needsKey &&
        h(
          "button",
          {
            type: "button",
            class: "quiet",
            onclick: () => window.dispatchEvent(new Event("needs-key")),
          },
          icon("key"),
          "Enter a key",
        ),
      h("button", { type: "button", class: "quiet", onclick: again }, icon("retry"), "Try again"),
    ),
  );
}

function sentence(text) {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}

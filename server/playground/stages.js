// The bar of an answer's stages, from `Server-Timing`.
import { duration, h } from "./dom.js";

// Groups of the server's stages, in the order in which a request goes through them.
const GROUPS = [
  [
    "upload",
    "Upload",
    ["upload", "admission", "fetch"],
    "the request arrives, is parsed and gets its turn",
  ],
  [
    "picture",
    "Decode",
    ["decode", "preprocess"],
    "workers decode the pictures and run the model's processor",
  ],
  ["render", "Render", ["render"], "chat template, tokens and placeholders"],
  ["queue", "Queue", ["image_queue", "engine_queue"], "waiting for a worker and for the engine"],
  ["first", "Until the first word", ["first"], "stages that the server does not tell apart"],
  ["encode", "Encode", ["encode"], "the vision encoder turns pictures into embeddings"],
  ["prefill", "Prefill", ["prefill", "first_token"], "the language model reads the prompt"],
  [
    "generate",
    "Generate",
    ["generate", "respond"],
    "the language model writes the answer, token by token",
  ],
];

/** A bar with a legend. `timing` has milliseconds by stage, and `total`. */
export function stageBar(timing) {
  const total = timing.total || Object.values(timing).reduce((sum, ms) => sum + ms, 0);
  const groups = GROUPS.map(([id, label, stages, meaning]) => {
    const ms = stages.reduce((sum, stage) => sum + (timing[stage] ?? 0), 0);
    const parts = stages
      .filter((stage) => timing[stage])
      .map((stage) => `${stage} ${duration(timing[stage])}`);
    return { id, label, ms, title: `${label}: ${meaning} (${parts.join(", ")})` };
  }).filter(({ ms }) => ms > 0);
  const spoken = groups.map(({ label, ms }) => `${label} ${duration(ms)}`).join(", ");
  return h(
    "div",
    { class: "stages" },
    h(
      "div",
      { class: "track", role: "img", "aria-label": `Stages: ${spoken}; ${duration(total)} in all` },
      groups.map(({ id, ms, title }) =>
        h("span", { class: `seg ${id}`, title, style: { "flex-grow": ms } }),
      ),
    ),
    h(
      "ul",
      { class: "legend" },
      groups.map(({ id, label, ms, title }) =>
        h("li", { title }, h("i", { class: `seg ${id}` }), label, h("b", {}, duration(ms))),
      ),
    ),
  );
}

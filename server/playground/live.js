// The live page: what the server does now, from `/metrics`, which is read while the page is seen.
import { getText, hintOf } from "./api.js";
import { bytes, duration, h, number, plural } from "./dom.js";
import { by, parse, quantile, total } from "./metrics.js";
import { stageBar } from "./stages.js";

const INTERVAL_MS = 2000;
const KEPT = 60; // reads: two minutes
// Rates and quantiles are over the last reads.
const WINDOW = 10;
const TTFT = "saccade_time_to_first_token_seconds";

/** Increase per second of a counter between two reads. */
const rate = (old, now, name, labels) =>
  Math.max(total(now.samples, name, labels) - total(old.samples, name, labels), 0) /
  ((now.at - old.at) / 1000);
const few = (value) =>
  value >= 100
    ? number(Math.round(value))
    : value >= 10
      ? value.toFixed(1)
      : value.toFixed(2).replace(/\.?0+$/, "") || "0";
const seconds = (value) => (value === null ? "–" : duration(value * 1000));

class LivePage {
  reads = [];

  constructor(root) {
    this.tiles = {
      requests: tile("Requests", "per second"),
      ttft: tile("Time to first token", "median"),
      images: tile("Pictures", "per second"),
      tokens: tile("Tokens written", "per second"),
    };
    this.meters = h("div", { class: "meters" });
    this.caches = h("tbody");
    this.refusals = h("div");
    this.stages = h("div");
    this.state = h("p", { class: "note", role: "status" }, "Reading …");
    root.append(
      h(
        "div",
        { class: "sheet wide" },
        h("header", {}, h("h1", {}, "Live"), this.state),
        h(
          "div",
          { class: "tiles" },
          Object.values(this.tiles).map(({ root }) => root),
        ),
        h(
          "div",
          { class: "columns" },
          card("Now", this.meters),
          card("Where the time goes", this.stages),
        ),
        h(
          "div",
          { class: "columns" },
          card(
            "Caches",
            h(
              "table",
              {},
              h(
                "thead",
                {},
                h(
                  "tr",
                  {},
                  ["Cache", "Found", "Asked", "Bytes"].map((name) =>
                    h("th", { scope: "col" }, name),
                  ),
                ),
              ),
              this.caches,
            ),
          ),
          card("Refusals", this.refusals),
        ),
      ),
    );
  }

  start() {
    this.timer ??= setInterval(
      () => document.visibilityState === "visible" && this.read(),
      INTERVAL_MS,
    );
    this.read();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  async read() {
    try {
      const samples = parse(await getText("metrics"));
      this.reads.push({ at: performance.now(), samples });
      if (this.reads.length > KEPT) this.reads.shift();
      this.draw();
    } catch (error) {
      this.state.textContent = `${error.message} ${hintOf(error)}`;
    }
  }

  draw() {
    const now = this.reads.at(-1);
    const old = this.reads.at(-Math.min(WINDOW, this.reads.length));
    const pairs = this.reads.slice(1).map((read, index) => [this.reads[index], read]);
    const build = now.samples.get("saccade_build_info")?.[0]?.labels ?? {};
    const ready = total(now.samples, "saccade_ready") ? "ready" : "not ready";
    this.state.textContent = `${build.model ?? ""} on ${build.device ?? "?"}, ${ready}. Saccade ${build.version}, vLLM ${build.vllm}.`;
    const line = (of) => pairs.map(([a, b]) => of(a, b));
    const requests = (a, b) => rate(a, b, "saccade_requests_total");
    const images = (a, b) => rate(a, b, "saccade_image_tokens_count");
    const tokens = (a, b) => rate(a, b, "vllm:generation_tokens_total");
    const moved = now !== old;
    // Without an answer in the last reads, all of them since the start count.
    const isRecent =
      moved && total(now.samples, `${TTFT}_count`) > total(old.samples, `${TTFT}_count`);
    const before = isRecent ? old.samples : new Map();
    const since = isRecent ? "of the last 20 s" : "since the start";
    const median = quantile(before, now.samples, TTFT, 0.5);
    this.tiles.requests.set(moved ? few(requests(old, now)) : "–", line(requests));
    this.tiles.images.set(moved ? few(images(old, now)) : "–", line(images));
    this.tiles.tokens.set(moved ? few(tokens(old, now)) : "–", line(tokens));
    this.tiles.ttft.set(
      seconds(median),
      line((a, b) => (quantile(a.samples, b.samples, TTFT, 0.5) ?? 0) * 1000),
      `median ${since}`,
    );
    this.drawMeters(now.samples);
    this.drawStages(before, now.samples, since);
    this.drawCaches(now.samples);
    this.drawRefusals(now.samples);
  }

  drawMeters(samples) {
    const held = (resource) => [
      total(samples, "saccade_admission_held", { resource }),
      total(samples, "saccade_admission_limit", { resource }),
    ];
    const rows = [
      [
        "Image workers busy",
        total(samples, "saccade_image_workers_busy"),
        total(samples, "saccade_image_workers"),
        number,
      ],
      [
        "Pictures that wait for a worker",
        total(samples, "saccade_image_queue"),
        total(samples, "saccade_image_queue_limit"),
        number,
      ],
      ["Requests admitted", total(samples, "saccade_requests_running"), null, number],
      ["Requests that wait", total(samples, "saccade_requests_waiting"), null, number],
      [
        "KV cache",
        total(samples, "vllm:kv_cache_usage_perc"),
        1,
        (value) => `${Math.round(value * 100)} %`,
      ],
      ["Image tokens of running requests", ...held("image_tokens"), number],
      ["Memory of bodies", ...held("body_bytes"), bytes],
    ];
    this.meters.replaceChildren(
      ...rows.map(([label, value, limit, show]) =>
        h(
          "div",
          { class: "meter" },
          h("span", {}, label),
          h(
            "b",
            {},
            limit === null || limit === 1 ? show(value) : `${show(value)} of ${show(limit)}`,
          ),
          limit !== null &&
            h(
              "div",
              {
                class: "track",
                role: "meter",
                "aria-label": label,
                "aria-valuenow": value,
                "aria-valuemin": 0,
                "aria-valuemax": limit,
              },
              h("span", { style: { width: `${Math.min((100 * value) / (limit || 1), 100)}%` } }),
            ),
        ),
      ),
    );
  }

  drawStages(old, now, since) {
    const sums = by(now, "saccade_request_stage_seconds_sum", "stage");
    const sumsBefore = by(old, "saccade_request_stage_seconds_sum", "stage");
    const answered = total(now, `${TTFT}_count`) - total(old, `${TTFT}_count`);
    if (answered <= 0) {
      const text = "No answer yet. Ask something, and see here where its time went.";
      this.stages.replaceChildren(h("p", { class: "note" }, text));
      return;
    }
    const timing = Object.fromEntries(
      [...sums].map(([stage, sum]) => [
        stage,
        ((sum - (sumsBefore.get(stage) ?? 0)) / answered) * 1000,
      ]),
    );
    timing.total = Object.values(timing).reduce((sum, ms) => sum + ms, 0);
    this.stages.replaceChildren(
      h(
        "p",
        { class: "note" },
        `Mean of ${plural(answered, "answer")} ${since}: ${duration(timing.total)}`,
      ),
      stageBar(timing),
    );
  }

  drawCaches(samples) {
    const rows = [
      [
        "Features of pictures",
        total(samples, "saccade_image_lookups_total", { result: "hit" }),
        total(samples, "saccade_image_lookups_total"),
        total(samples, "saccade_features_bytes"),
      ],
      ...[...by(samples, "saccade_embedding_cache_bytes", "tier")].map(([tier, held]) => {
        const hits = total(samples, "saccade_embedding_cache_hits_total", { tier });
        return [
          `Embeddings (${tier})`,
          hits,
          hits + total(samples, "saccade_embedding_cache_misses_total", { tier }),
          held,
        ];
      }),
      [
        "Prefixes of prompts, in tokens",
        total(samples, "vllm:prefix_cache_hits_total"),
        total(samples, "vllm:prefix_cache_queries_total"),
        null,
      ],
      [
        "Fetched URLs",
        total(samples, "saccade_fetch_cache_requests_total", { result: "hit" }),
        total(samples, "saccade_fetch_cache_requests_total"),
        total(samples, "saccade_fetch_cache_bytes"),
      ],
    ];
    this.caches.replaceChildren(
      ...rows.map(([name, hits, asked, held]) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, name),
          h("td", {}, asked ? `${Math.round((100 * hits) / asked)} %` : "–"),
          h("td", {}, number(asked)),
          h("td", {}, held === null ? "–" : bytes(held)),
        ),
      ),
    );
  }

  drawRefusals(samples) {
    const found = [...by(samples, "saccade_refusals_total", "code")]
      .filter(([, count]) => count)
      .sort(([, a], [, b]) => b - a);
    const cancelled = total(samples, "saccade_cancellations_total");
    const rows = found.map(([code, count]) =>
      h("tr", {}, h("th", { scope: "row" }, h("code", {}, code)), h("td", {}, number(count))),
    );
    if (cancelled)
      rows.push(
        h(
          "tr",
          {},
          h("th", { scope: "row" }, "left by the client"),
          h("td", {}, number(cancelled)),
        ),
      );
    this.refusals.replaceChildren(
      rows.length
        ? h("table", {}, h("tbody", {}, rows))
        : h("p", { class: "note" }, "None since the start."),
    );
  }
}

function card(title, ...content) {
  return h("section", { class: "card" }, h("h2", {}, title), content);
}

/** A number with its course over the last two minutes. */
function tile(label, note) {
  const value = h("b", { class: "big" }, "–");
  const canvas = h("canvas", { role: "img", "aria-label": `${label} over the last two minutes` });
  const below = h("p", { class: "note" }, note);
  const root = h(
    "section",
    { class: "card tile", "aria-label": label },
    h("h2", {}, label),
    value,
    canvas,
    below,
  );
  const set = (text, points, newNote = note) => {
    value.textContent = text;
    below.textContent = newNote;
    spark(canvas, points);
  };
  return { root, set };
}

function spark(canvas, points) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  if (points.length < 2) return;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const color = getComputedStyle(canvas).color;
  const most = Math.max(...points) || 1;
  const at = (index) => [
    width - (points.length - 1 - index) * (width / (KEPT - 1)),
    height - 2 - (points[index] / most) * (height - 6),
  ];
  pen.beginPath();
  points.forEach((_, index) => pen.lineTo(...at(index)));
  pen.strokeStyle = color;
  pen.lineWidth = 1.75;
  pen.lineJoin = "round";
  pen.stroke();
  pen.lineTo(width, height);
  pen.lineTo(at(0)[0], height);
  pen.globalAlpha = 0.12;
  pen.fillStyle = color;
  pen.fill();
}

let page = null;
export const live = {
  show(root) {
    page ??= new LivePage(root);
    page.start();
  },
  hide: () => page?.stop(),
};

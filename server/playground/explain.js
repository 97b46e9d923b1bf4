// The lesson: how a picture becomes tokens, shown on a picture of one's own.
import { postJson, urlOf, hintOf } from "./api.js";
import { ask } from "./ask.js";
import { ACCEPTED, attach, costsOf, partOf, release } from "./attachments.js";
import { bytes, h, icon, number, plural } from "./dom.js";
import { drawGrid, drawSeen, mainGroup, mergeOf, viewGroups } from "./views.js";

const QUESTION = "What is in the image?";
const FREE = { detail: "auto", cap: null, budget: null };
const SAMPLE = "three-shapes.png";
// Placeholders of models: the token that stands for one token of a picture.
const PLACEHOLDER = /image|img|vision|patch/i;
const LEAST_RUN = 4;
const DELAY_MS = 60;
// Of a drawn picture, in pixels of the screen.
const TALLEST = 420;

let context = null;

class ExplainPage {
  constructor(root) {
    this.steps = h("div", { class: "steps" });
    this.file = h("input", {
      type: "file",
      class: "hidden",
      accept: ACCEPTED,
      tabindex: "-1",
      "aria-hidden": "true",
      onchange: () => this.file.files[0] && this.choose(() => this.file.files[0]),
    });
    root.append(
      h(
        "div",
        { class: "sheet" },
        h(
          "header",
          {},
          h("h1", {}, "How a picture becomes tokens"),
          h(
            "p",
            { class: "lead" },
            "A language model reads tokens. Here is how this model turns your picture into them, what each costs, and what you can change.",
          ),
          h(
            "p",
            { class: "row" },
            h(
              "button",
              { type: "button", class: "primary", onclick: () => this.file.click() },
              "Use your own picture",
            ),
            this.file,
          ),
        ),
        this.steps,
      ),
    );
    new ResizeObserver(() => this.redraw()).observe(this.steps);
    window.addEventListener("theme", () => this.redraw());
  }

  /** The picture of the page to ask, or else a sample. */
  async open() {
    const asked = ask.picture();
    if (asked?.width) {
      if (asked !== this.attachment) await this.use(asked);
    } else if (!this.attachment) {
      const sample = async () => (await fetch(urlOf(`playground/samples/${SAMPLE}`))).blob();
      await this.choose(sample, SAMPLE);
    }
  }

  /** Use the file that `read` gives, unless another picture is chosen meanwhile. */
  async choose(read, name) {
    const choice = (this.choice = Symbol(name));
    const chosen = await attach(await read(), name);
    release(chosen); // it is drawn on canvases only
    if (this.choice === choice) await this.use(chosen);
  }

  async use(attachment) {
    this.choice = null;
    this.attachment = attachment;
    if (!attachment.width) {
      this.steps.replaceChildren(
        h(
          "p",
          { class: "error", role: "alert" },
          "The browser cannot show this file. Choose a JPEG, PNG or WebP picture.",
        ),
      );
      return;
    }
    try {
      const cost = await costsOf([attachment], FREE);
      if (this.attachment !== attachment) return;
      this.row = cost.rows.get(attachment.id)[0];
      this.draw();
      await this.drawPrompt();
    } catch (error) {
      if (this.attachment !== attachment) return;
      this.steps.replaceChildren(
        h("p", { class: "error", role: "alert" }, `${error.message} ${hintOf(error)}`),
      );
    }
  }

  draw() {
    const { attachment, row } = this;
    const groups = viewGroups(row);
    const views = row.views.filter((view) => view.kind !== "joined");
    const merge = mergeOf(row);
    const patches = merge
      ? views.reduce((sum, view) => sum + view.columns * view.rows * merge * merge, 0)
      : 0;
    this.canvases = [];
    const picture = (options, label) => {
      const canvas = h("canvas", { class: "exhibit", role: "img", "aria-label": label });
      this.canvases.push([canvas, { row, ...options }]);
      return canvas;
    };
    this.prompt = h("div", { class: "prompt" }, "…");
    this.steps.replaceChildren(
      step(
        "Your picture",
        [
          `${number(row.width)} × ${number(row.height)} pixels with three numbers each: ${number(row.width * row.height * 3)} numbers, in a file of ${bytes(attachment.blob.size)}.`,
          "The server reads its size from the first bytes. That is all it needs to know what follows.",
        ],
        picture({}, `The picture ${attachment.name}`),
      ),
      step(
        groups.has("tile")
          ? "It is cut into tiles"
          : groups.has("crop")
            ? "It is resized, and cropped"
            : "It is resized",
        [sizeText(row, groups)],
        picture({ seen: true, tiles: true }, "The picture at the resolution that the encoder gets"),
      ),
      merge
        ? step(
            "It is cut into patches",
            [
              `The vision encoder takes squares of ${row.patch_size} × ${row.patch_size} pixels: ${number(patches)} patches. Each becomes a vector, and in the layers of the encoder every patch looks at the others.`,
            ],
            picture({ seen: true, patches: true }, `A grid of ${number(patches)} patches`),
          )
        : "",
      step(
        "Patches become tokens",
        tokenText(row, merge),
        h(
          "div",
          { class: "pair" },
          merge > 1 && mergeDiagram(merge),
          picture({ seen: true, grid: true }, `A grid of ${plural(row.tokens, "token")}`),
        ),
      ),
      step(
        "They take their places in the prompt",
        [
          `The chat template writes one placeholder for the picture. It is expanded to ${plural(row.prompt_tokens, "place")}${row.prompt_tokens > row.tokens ? `: ${number(row.tokens)} for tokens of the picture, the others for tags and line breaks` : ""}. The vectors of the picture replace those of the placeholders; the rest is text.`,
        ],
        this.prompt,
      ),
      step(
        "They are kept while the answer is written",
        kvText(row, context.models?.[0]?.max_model_len),
        kvBar(row, context.models?.[0]?.max_model_len),
      ),
      this.capStep(),
    );
    this.redraw();
  }

  capStep() {
    const { row, attachment } = this;
    const result = h("p", { class: "plan" });
    const canvas = h("canvas", {
      class: "exhibit",
      role: "img",
      "aria-label": "The picture under the cap",
    });
    const shown = { row, seen: true, grid: true };
    this.canvases.push([canvas, shown]);
    const slider = h("input", {
      type: "range",
      min: "1",
      max: String(row.tokens),
      value: String(row.tokens),
      "aria-label": "Cap on the picture's tokens",
      oninput: () => later(),
    });
    const show = async () => {
      this.capping?.abort();
      this.capping = new AbortController();
      const cap = Number(slider.value);
      try {
        const cost = await costsOf([attachment], { ...FREE, cap }, this.capping.signal);
        const capped = (shown.row = cost.rows.get(attachment.id)[0]);
        const share = Math.round((100 * capped.tokens) / row.tokens);
        result.replaceChildren(
          h("b", {}, `Cap ${number(cap)}: ${plural(capped.tokens, "token")}`),
          ` (${share} %), seen as ${capped.processed_width} × ${capped.processed_height}, ${bytes(capped.kv_bytes)} of KV cache.`,
        );
        this.redraw();
      } catch (error) {
        if (error.name !== "AbortError")
          result.textContent = `Cap ${number(cap)}: ${error.message}.`;
      }
    };
    const later = () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(show, DELAY_MS);
    };
    show();
    return step(
      "What a cap changes",
      [
        "With fewer tokens the model sees less detail, answers sooner, and leaves room for others. Set “max_tokens” beside a picture, “detail”, or “max_image_tokens” for all pictures of a request. The cap is exact: move it.",
      ],
      h("div", { class: "cap" }, slider, result, canvas),
    );
  }

  async drawPrompt() {
    const { attachment, prompt } = this;
    const part = await partOf(attachment, FREE);
    const messages = [{ role: "user", content: [part, { type: "text", text: QUESTION }] }];
    try {
      const answer = await postJson("tokenize", {
        model: context.model(),
        messages,
        return_token_strs: true,
      });
      prompt.replaceChildren(...promptOf(answer));
    } catch (error) {
      prompt.replaceChildren(h("p", { class: "note" }, error.message));
    }
  }

  redraw() {
    for (const [canvas, options] of this.canvases ?? []) paint(canvas, this.attachment, options);
  }
}

function step(title, texts, exhibit) {
  return h(
    "section",
    { class: "step" },
    h(
      "div",
      {},
      h("h2", {}, title),
      texts.filter(Boolean).map((text) => h("p", {}, text)),
    ),
    exhibit,
  );
}

function sizeText(row, groups) {
  const seen = `${number(row.processed_width)} × ${number(row.processed_height)}`;
  const tiles = groups.get("tile")?.length;
  if (tiles) {
    const [tile] = groups.get("tile");
    return `The picture is fitted to ${seen} pixels and cut into ${plural(tiles, "tile")} of ${tile.width} × ${tile.height}. Each goes through the encoder by itself${groups.has("overview") ? ", and so does a small view of the whole" : ""}.`;
  }
  if (groups.has("crop"))
    return `The whole picture becomes ${seen} pixels, and ${plural(groups.get("crop").length, "crop")} of the same size show more detail.`;
  if (row.processed_width === row.width && row.processed_height === row.height)
    return `This model keeps ${seen} pixels: the sides already fit its grid, and there is no more to it than its budget allows.`;
  const [left, top, right, bottom] = row.region;
  const isCropped = left > 0 || top > 0 || right < row.width || bottom < row.height;
  return `The model sees ${seen} pixels${isCropped ? " of its middle" : ""}. Here they are: what is lost here, it cannot see. JPEG files are even decoded no larger than needed.`;
}

function tokenText(row, merge) {
  const [view] = row.views;
  if (!view)
    return [
      `The picture takes ${plural(row.tokens, "token")}. This model's processor was asked how many; it does not tell where they are.`,
    ];
  if (!view.columns)
    return [
      `A resampler looks at all patches with ${number(row.tokens)} learned queries. Each becomes a token; tokens have no place in the picture.`,
    ];
  const how =
    merge > 1
      ? `${merge} × ${merge} neighbouring patches are merged into one token, and a projector turns it into the language model's own size of vector.`
      : "A projector turns each patch into the language model's own size of vector: a token.";
  return [
    how,
    `The picture takes ${plural(row.tokens, "token")}. To the language model each is like a word.`,
  ];
}

function kvText(row, most) {
  const each = row.kv_bytes / row.prompt_tokens;
  return [
    `Every layer of the language model keeps a key and a value of each token: ${bytes(each)} a token, ${bytes(row.kv_bytes)} for this picture. This memory limits how many requests are answered at the same time.`,
    most &&
      `The picture takes ${((100 * row.prompt_tokens) / most).toFixed(1)} % of the longest prompt, ${number(most)} tokens.`,
  ];
}

function kvBar(row, most) {
  if (!most) return h("div");
  const share = Math.min((100 * row.prompt_tokens) / most, 100);
  return h(
    "div",
    { class: "kv" },
    h(
      "div",
      {
        class: "track",
        role: "img",
        "aria-label": `The picture takes ${share.toFixed(1)} % of the longest prompt`,
      },
      h("span", {
        class: "seg encode",
        style: { width: `${share}%`, "flex-grow": 0, "flex-basis": "auto" },
      }),
    ),
    h(
      "p",
      { class: "row note" },
      h("span", {}, "this picture"),
      h("span", { class: "spring" }),
      h("span", {}, `${number(most)} tokens`),
    ),
  );
}

function mergeDiagram(merge) {
  const cells = Array.from({ length: merge * merge }, () => h("i"));
  return h(
    "div",
    { class: "merge", role: "img", "aria-label": `${merge} by ${merge} patches become one token` },
    h(
      "span",
      { class: "patches", style: { "grid-template-columns": `repeat(${merge}, 1fr)` } },
      cells,
    ),
    icon("send"),
    h("span", { class: "one" }),
  );
}

/** The tokens of a prompt as chips; those of pictures are counted. */
function promptOf({ token_strs: texts, count }) {
  const chips = [];
  for (let at = 0; at < texts.length;) {
    let end = at + 1;
    while (texts[end] === texts[at]) end += 1;
    const text = texts[at].replaceAll("Ġ", "·").replaceAll("▁", "·").replaceAll("Ċ", "↵");
    if (end - at >= LEAST_RUN && PLACEHOLDER.test(text))
      chips.push(
        h(
          "span",
          { class: "tok many", style: { "flex-grow": end - at } },
          h("code", {}, text),
          h("b", {}, ` × ${number(end - at)}`),
        ),
      );
    else
      for (let index = at; index < end; index++)
        chips.push(
          h("span", { class: `tok${/^<.*>$/.test(text) ? " special" : ""}` }, h("code", {}, text)),
        );
    at = end;
  }
  return [
    h("div", { class: "chips" }, chips),
    h("p", { class: "note" }, `${plural(count, "token")} in all, with the question “${QUESTION}”`),
  ];
}

/** Draw a picture and what `options` ask for into a canvas of its own aspect ratio. */
function paint(canvas, attachment, { row, seen, grid, patches, tiles }) {
  const { width, height } = attachment;
  canvas.style.aspectRatio = `${width} / ${height}`;
  canvas.style.maxWidth = `${(TALLEST * width) / height}px`;
  const ratio = window.devicePixelRatio || 1;
  const [w, t] = [canvas.clientWidth, canvas.clientHeight];
  if (!w || !t) return;
  canvas.width = w * ratio;
  canvas.height = t * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(attachment.picture, 0, 0, w, t);
  const place = ([x1, y1, x2, y2]) => [
    (x1 / width) * w,
    (y1 / height) * t,
    ((x2 - x1) / width) * w,
    ((y2 - y1) / height) * t,
  ];
  const groups = viewGroups(row);
  const shown = groups.get(mainGroup(groups)) ?? [];
  if (seen) for (const view of shown) drawSeen(pen, attachment, view, place(view.region));
  const merge = mergeOf(row) || 1;
  for (const view of grid || patches || tiles ? shown : []) {
    const finer = patches
      ? { columns: view.columns * merge, rows: view.rows * merge }
      : tiles
        ? { columns: null }
        : {};
    drawGrid(pen, { ...view, ...finer }, place(view.region), {
      merge: 1,
      isFramed: shown.length > 1,
    });
  }
}

let page = null;
export const explain = {
  show(root, given) {
    context = given;
    page ??= new ExplainPage(root);
    page.open();
  },
};

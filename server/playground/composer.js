// Where a question is written: its attachments, what they cost, and the choices that change it.
import { hintOf } from "./api.js";
import { ACCEPTED, attach, costsOf, release } from "./attachments.js";
import { bytes, h, icon, iconButton, plural } from "./dom.js";
import { preview } from "./faces.js";

const COST_DELAY_MS = 120;

export class Composer {
  attachments = [];
  choices = { detail: "auto", cap: null, budget: null };
  costs = null;
  isRunning = false;
  taking = Promise.resolve(); // until all chosen files are attached
  starts = 0;

  /** Takes what is dropped on `root`. Calls `on.send`, `on.stop`, and for attachments `on.inspect`,
   * `on.remove` and `on.price`. */
  constructor(root, on) {
    this.on = on;
    this.tray = h("ul", { class: "tray", "aria-label": "Attached" });
    this.text = h("textarea", {
      rows: "1",
      "aria-label": "Question",
      placeholder: "Ask about a picture",
      oninput: () => this.fit(),
      onkeydown: (event) => this.onKey(event),
    });
    this.cost = h("output", { class: "cost", "aria-label": "Cost" });
    this.sendButton = h(
      "button",
      { class: "icon primary send", type: "submit", "aria-label": "Send", title: "Send (Enter)" },
      icon("send"),
    );
    this.file = h("input", {
      type: "file",
      class: "hidden",
      multiple: true,
      accept: ACCEPTED,
      tabindex: "-1",
      "aria-hidden": "true",
      onchange: () => this.take(this.file.files),
    });
    this.settings = this.choicesPanel();
    this.toggle = iconButton(
      "sliders",
      "Detail and caps",
      () => this.showSettings(this.settings.hidden),
      { "aria-expanded": "false", "aria-controls": "choices" },
    );
    this.form = h(
      "form",
      { class: "composer", onsubmit: (event) => this.onSubmit(event) },
      this.tray,
      this.text,
      this.settings,
      h(
        "div",
        { class: "row" },
        iconButton("attach", "Add pictures, PDFs or clips", () => this.file.click()),
        iconButton("camera", "Take a picture", () => this.takePhoto()),
        this.toggle,
        this.cost,
        this.sendButton,
      ),
      this.file,
    );
    this.acceptDrops(root);
    window.addEventListener("paste", (event) => {
      if (root.hidden || !event.clipboardData?.files.length) return;
      event.preventDefault();
      this.take(event.clipboardData.files);
    });
    window.addEventListener("key-set", () => this.estimate());
  }

  /** Begin anew with these files and this text. */
  async start(files, names, text) {
    this.starts += 1;
    this.attachments.forEach(release);
    this.attachments = [];
    this.text.value = text;
    this.fit();
    await this.take(files, names);
  }

  /** Hand the question over, with what is attached. */
  send(text) {
    if (!text && !this.attachments.length) return;
    const question = { text, attachments: this.attachments, choices: { ...this.choices } };
    this.attachments = [];
    this.text.value = "";
    this.fit();
    this.drawTray();
    this.on.send(question);
  }

  fit() {
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight}px`;
  }

  onKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.form.requestSubmit();
    } else if (event.key === "Escape") {
      this.on.stop();
    }
  }

  async onSubmit(event) {
    event.preventDefault();
    if (this.isRunning) return this.on.stop();
    await this.taking;
    if (!this.isRunning) this.send(this.text.value.trim());
  }

  setRunning(on) {
    this.isRunning = on;
    this.sendButton.replaceChildren(icon(on ? "stop" : "send"));
    this.sendButton.setAttribute("aria-label", on ? "Stop" : "Send");
    this.sendButton.title = on ? "Stop (Escape)" : "Send (Enter)";
  }

  // ------------------------------------------------------------------ attachments

  take(files, names) {
    const taken = Promise.all([...files].map((file, index) => attach(file, names?.[index])));
    this.file.value = "";
    const { starts } = this;
    this.taking = this.taking.then(async () => this.add(await taken, starts));
    return this.taking;
  }

  /** Attach files that were chosen when there had been `starts`: none of a start before. */
  add(added, starts) {
    if (starts !== this.starts) return added.forEach(release);
    this.attachments.push(...added);
    this.drawTray();
    const first = added.find((each) => each.width) ?? added[0];
    if (first) this.on.inspect(first, false);
    this.text.focus();
  }

  remove(attachment) {
    this.attachments = this.attachments.filter((each) => each !== attachment);
    this.drawTray();
    this.on.remove(attachment);
    release(attachment);
    this.text.focus();
  }

  drawTray() {
    this.tray.replaceChildren(...this.attachments.map((each) => this.chip(each)));
    this.estimate();
  }

  chip(attachment) {
    const { kind, name } = attachment;
    const cost = h("span", { class: "tokens" });
    attachment.costLabel = cost;
    return h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          class: "thumb",
          title: name,
          "aria-label": `Show ${name}`,
          onclick: () => this.on.inspect(attachment, true),
        },
        preview(attachment),
      ),
      cost,
      kind === "pdf" &&
        h("input", {
          class: "pages",
          placeholder: "all pages",
          "aria-label": `Pages of ${name}`,
          title: "Pages, such as 1-3,7",
          value: attachment.pages,
          oninput: (event) => {
            attachment.pages = event.target.value.trim();
            this.estimate();
          },
        }),
      iconButton("close", `Remove ${name}`, () => this.remove(attachment)),
    );
  }

  acceptDrops(root) {
    const isFiles = (event) => event.dataTransfer?.types.includes("Files");
    root.addEventListener("dragover", (event) => {
      if (!isFiles(event)) return;
      event.preventDefault();
      root.classList.add("dropping");
    });
    root.addEventListener("dragleave", (event) => {
      if (!root.contains(event.relatedTarget)) root.classList.remove("dropping");
    });
    root.addEventListener("drop", (event) => {
      if (!isFiles(event)) return;
      event.preventDefault();
      root.classList.remove("dropping");
      this.take(event.dataTransfer.files);
    });
  }

  async takePhoto() {
    const { capture } = await import("./camera.js");
    const photo = await capture();
    if (photo) this.take([photo], ["photo.jpg"]);
  }

  // ------------------------------------------------------------------ cost

  choicesPanel() {
    const changed = () => this.estimate();
    const detail = ["auto", "low", "high"].map((value) =>
      h(
        "label",
        {},
        h("input", {
          type: "radio",
          name: "detail",
          value,
          checked: value === "auto",
          onchange: () => ((this.choices.detail = value), changed()),
        }),
        h("span", {}, value),
      ),
    );
    const cap = (name, label, hint) =>
      h(
        "label",
        { class: "field" },
        h("span", {}, label),
        h("input", {
          type: "number",
          min: "1",
          inputmode: "numeric",
          placeholder: "no cap",
          title: hint,
          name,
          oninput: (event) => (
            (this.choices[name] = Number.parseInt(event.target.value, 10) || null),
            changed()
          ),
        }),
      );
    return h(
      "div",
      { id: "choices", class: "choices", hidden: true },
      h("fieldset", { class: "segmented" }, h("legend", {}, "Detail"), detail),
      cap("cap", "Tokens per picture", "max_tokens beside each picture"),
      cap("budget", "Tokens for all", "max_image_tokens of the request"),
      (this.plan = h("p", { class: "plan" })),
    );
  }

  showSettings(open) {
    this.settings.hidden = !open;
    this.toggle.setAttribute("aria-expanded", String(open));
  }

  /** Ask what the attachments would cost, shortly after the last change. */
  estimate() {
    clearTimeout(this.timer);
    this.estimating?.abort();
    this.cost.setAttribute("aria-busy", "true");
    this.timer = setTimeout(() => this.count(), COST_DELAY_MS);
  }

  async count() {
    const control = (this.estimating = new AbortController());
    const mine = [...this.attachments];
    try {
      this.costs = await costsOf(mine, this.choices, control.signal);
      this.showCosts(null);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.costs = null;
      this.showCosts(error);
    }
    for (const each of mine) {
      const rows = this.costs?.rows.get(each.id) ?? [];
      each.costLabel.textContent = priceOf(each, rows, this.costs?.clips.get(each.id));
      each.row = rows[0];
      each.rowCount = rows.length;
      this.on.price(each);
    }
    this.cost.setAttribute("aria-busy", "false");
  }

  showCosts(error) {
    if (error?.status === 404) error = null; // the model takes no pictures, or another server is behind
    this.cost.classList.toggle("bad", Boolean(error));
    if (error) {
      this.cost.replaceChildren(error.status === 401 ? "a key is needed" : error.message);
      this.cost.title = hintOf(error);
      this.plan.textContent = "";
      return;
    }
    const usage = this.costs?.usage;
    this.cost.title = usage ? "Tokens of the pictures and clips, and the KV cache that they will occupy" : "";
    this.cost.replaceChildren(
      ...(usage
        ? [
            h("b", {}, plural(usage.image_tokens + (usage.video_tokens ?? 0), "token")),
            h("span", {}, ` · ${bytes(usage.kv_bytes)} of KV cache`),
          ]
        : []),
    );
    const rows = this.costs?.data ?? [];
    this.plan.textContent = rows
      .map(
        (row) =>
          `${row.width}×${row.height} → ${row.processed_width}×${row.processed_height}, ${plural(row.tokens, "token")}`,
      )
      .join("; ");
  }
}

function priceOf({ kind }, rows, clip) {
  if (rows.length) return plural(sum(rows, "tokens"), "token");
  if (clip) return `${plural(clip.tokens, "token")}, ${plural(clip.frames.length, "frame")}`;
  return kind === "video" || kind === "audio" ? "counted when sent" : "";
}

const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);

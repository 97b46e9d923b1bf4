// A picture as the model sees it: its grid of tokens, its tiles, and the boxes of an answer.
import { toOriginal, unitOf } from "./boxes.js";
import { bytes, h, iconButton, number, plural } from "./dom.js";
import { drawGrid, drawSeen, mainGroup, mergeOf, viewGroups } from "./views.js";

const BOX_COLORS = ["#ff5a36", "#2f7bff", "#12a150", "#b14cff", "#d98a00", "#e0218a"];
const MOST_ZOOM = 24;
const GROUPS = {
  whole: "Picture",
  tile: "Tiles",
  joined: "Joined tiles",
  overview: "Overview",
  crop: "Crops",
};
const ROLES = {
  whole: "the encoder sees it at once",
  tile: "each goes through the encoder by itself",
  joined: "the tiles' features, without padding, in one grid with a line break for each row",
  overview: "the whole picture once more, small",
  crop: "parts of the picture, enlarged",
};

const HINTS = {
  none: "Choose a picture to see it as the model does.",
  image: "The browser cannot show this file, but the model sees it.",
  pdf: "The server draws the pages. This is the grid of the first.",
  video: "The server picks the frames of a clip by the model's rule.",
  audio: "The model hears a sound, and its tokens are counted when it is sent.",
};

export class Inspector {
  attachment = null;
  zoom = 1;
  pan = [0, 0];
  hovered = null;

  constructor() {
    this.canvas = h("canvas", { role: "img", "aria-label": "No picture", tabindex: "0" });
    this.options = h("div", { class: "row" });
    this.status = h("p", { class: "note status" });
    this.facts = h("dl", { class: "sizes" });
    this.title = h("h2", {}, "The picture");
    this.layers = { grid: true, seen: false };
    this.root = h(
      "aside",
      { class: "inspector", "aria-label": "The picture as the model sees it" },
      h(
        "header",
        { class: "row" },
        this.title,
        h("span", { class: "spring" }),
        this.zoomButtons(),
        iconButton("close", "Close", () => this.close(), { class: "icon closer" }),
      ),
      h(
        "div",
        { class: "stage" },
        this.canvas,
        (this.empty = h(
          "p",
          { class: "note empty" },
          "Choose a picture to see it as the model does.",
        )),
      ),
      this.options,
      this.status,
      this.facts,
    );
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    window.addEventListener("theme", () => this.draw());
    this.listen();
    this.clear();
  }

  zoomButtons() {
    return h(
      "div",
      { class: "row tight" },
      iconButton("minus", "Zoom out", () => this.zoomBy(1 / 1.5)),
      iconButton("expand", "Fit", () => this.fit()),
      iconButton("attach", "Zoom in", () => this.zoomBy(1.5)),
    );
  }

  /** `row` is of `/v1/images/tokens`, `shown` of an answer's `image_details`. */
  show({ attachment, row, shown, boxes }, openSheet) {
    const isOther = this.attachment !== attachment;
    this.attachment = attachment;
    this.shown = shown ?? null;
    this.boxes = boxes;
    this.unit = unitOf(boxes);
    this.title.textContent = attachment.name;
    if (isOther) this.group = null;
    this.update({ row });
    if (isOther) this.fit();
    if (openSheet) {
      this.root.classList.add("open");
      if (getComputedStyle(this.root).position === "fixed")
        this.root.querySelector(".closer").focus();
    }
  }

  update({ row }) {
    this.row = row ?? null;
    this.groups = viewGroups(row);
    if (!this.groups.has(this.group)) this.group = mainGroup(this.groups);
    this.hovered = null;
    this.empty.hidden = Boolean(this.size);
    this.empty.textContent = this.hint;
    this.status.textContent = this.size ? this.hint : "";
    this.drawOptions();
    this.drawFacts();
    this.draw();
  }

  /** (width, height) in pixels of what is drawn; null if that is not known. */
  get size() {
    const { attachment, row } = this;
    if (attachment?.width) return [attachment.width, attachment.height];
    return row?.views?.length ? [row.width, row.height] : null;
  }

  /** Why the picture itself is not seen; "" if it is. */
  get hint() {
    return this.attachment?.width ? "" : HINTS[this.attachment?.kind ?? "none"];
  }

  clear() {
    this.attachment = this.row = this.shown = null;
    this.boxes = [];
    this.groups = new Map();
    this.title.textContent = "The picture";
    this.update({ row: null });
  }

  close() {
    this.root.classList.remove("open");
  }

  // ------------------------------------------------------------------ words

  drawOptions() {
    const toggle = (name, label) =>
      h(
        "label",
        { class: "check" },
        h("input", {
          type: "checkbox",
          checked: this.layers[name],
          onchange: (event) => ((this.layers[name] = event.target.checked), this.draw()),
        }),
        label,
      );
    const groups = [...this.groups.keys()];
    this.options.replaceChildren(
      ...(this.groups.size ? [toggle("grid", "Grid")] : []),
      ...(this.groups.size && this.attachment.picture
        ? [toggle("seen", "At the model’s resolution")]
        : []),
      ...(groups.length > 1
        ? [
            h(
              "div",
              { class: "segmented", role: "group", "aria-label": "View" },
              groups.map((kind) =>
                h(
                  "button",
                  {
                    type: "button",
                    "aria-pressed": String(kind === this.group),
                    title: ROLES[kind],
                    onclick: () => ((this.group = kind), this.drawOptions(), this.draw()),
                  },
                  GROUPS[kind],
                ),
              ),
            ),
          ]
        : []),
      ...(this.boxes.length
        ? [
            h(
              "label",
              { class: "check" },
              "Boxes in",
              h(
                "select",
                {
                  "aria-label": "Unit of boxes",
                  onchange: (event) => ((this.unit = event.target.value), this.draw()),
                },
                ["thousandths", "pixels"].map((unit) =>
                  h("option", { value: unit, selected: unit === this.unit }, unit),
                ),
              ),
            ),
          ]
        : []),
    );
  }

  drawFacts() {
    const { row, size } = this;
    const facts = [];
    if (size) facts.push(["Original", size.join(" × "), "pixels"]);
    if (row?.processed_width)
      facts.push([
        "Seen as",
        `${row.processed_width} × ${row.processed_height}`,
        "pixels that the encoder gets",
      ]);
    for (const [kind, views] of this.groups) {
      const [view] = views;
      if (!view.columns) continue;
      const grid = `${view.columns} × ${view.rows}`;
      facts.push([
        GROUPS[kind],
        views.length > 1 ? `${views.length} of ${grid} tokens` : `${grid} tokens`,
        ROLES[kind],
      ]);
    }
    const merge = mergeOf(row);
    if (merge)
      facts.push([
        "A token is",
        merge > 1 ? `${merge} × ${merge} patches` : "one patch",
        `patches of ${row.patch_size} × ${row.patch_size} pixels`,
      ]);
    if (row) {
      const more = row.prompt_tokens - row.tokens;
      facts.push([
        "Cost",
        plural(row.tokens, "token"),
        more ? `and ${number(more)} for tags and line breaks` : "of the prompt",
      ]);
      facts.push(["KV cache", bytes(row.kv_bytes), "kept while the answer is written"]);
    }
    this.facts.replaceChildren(
      ...facts.flatMap(([name, value, note]) => [
        h("dt", {}, name),
        h("dd", {}, h("b", {}, value), h("span", {}, note)),
      ]),
    );
  }

  // ------------------------------------------------------------------ picture

  fit() {
    this.zoom = 1;
    this.pan = [0, 0];
    this.draw();
  }

  zoomBy(factor, at = [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2]) {
    const before = this.zoom;
    this.zoom = Math.min(Math.max(this.zoom * factor, 1), MOST_ZOOM);
    const change = this.zoom / before;
    // The point under the pointer stays where it is.
    const middle = [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2];
    this.pan = this.pan.map(
      (value, axis) => (value + middle[axis] - at[axis]) * change - middle[axis] + at[axis],
    );
    if (this.zoom === 1) this.pan = [0, 0];
    this.draw();
  }

  listen() {
    const { canvas } = this;
    const at = (event) => [event.offsetX, event.offsetY];
    const pointers = new Map();
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (!this.size) return;
        event.preventDefault();
        this.zoomBy(Math.exp(-event.deltaY / 300), at(event));
      },
      { passive: false },
    );
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, at(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) {
        this.hover(at(event));
        return;
      }
      const now = at(event);
      if (pointers.size === 2) {
        const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
        const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
        this.zoomBy(distance(now) / Math.max(distance(before), 1), other);
      } else {
        this.pan = this.pan.map((value, axis) => value + now[axis] - before[axis]);
        this.draw();
      }
      pointers.set(event.pointerId, now);
    });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("dblclick", (event) =>
      this.zoom > 1 ? this.fit() : this.zoomBy(4, at(event)),
    );
    canvas.addEventListener("keydown", (event) => {
      const moves = {
        ArrowLeft: [40, 0],
        ArrowRight: [-40, 0],
        ArrowUp: [0, 40],
        ArrowDown: [0, -40],
      };
      if (event.key === "+" || event.key === "=") this.zoomBy(1.5);
      else if (event.key === "-") this.zoomBy(1 / 1.5);
      else if (event.key === "0") this.fit();
      else if (event.key in moves) {
        this.pan = this.pan.map((value, axis) => value + moves[event.key][axis]);
        this.draw();
      } else return;
      event.preventDefault();
    });
    this.root.addEventListener("keydown", (event) => event.key === "Escape" && this.close());
  }

  hover(point) {
    let found = null;
    if (point && this.scale) {
      const [x, y] = [
        (point[0] - this.origin[0]) / this.scale,
        (point[1] - this.origin[1]) / this.scale,
      ];
      let before = 0;
      for (const [kind, views] of this.groups) {
        for (const [index, view] of views.entries()) {
          const [left, top, right, bottom] = view.region;
          const inside = x >= left && x < right && y >= top && y < bottom;
          if (kind === this.group && inside && view.columns) {
            const column = Math.floor(((x - left) / (right - left)) * view.columns);
            const row = Math.floor(((y - top) / (bottom - top)) * view.rows);
            found = {
              view,
              column,
              row,
              place: before + row * view.columns + column,
              index,
              many: views.length > 1,
            };
          }
          before += view.tokens ?? 0;
        }
      }
    }
    this.hovered = found;
    const { row } = this;
    this.status.textContent = found
      ? `${found.many ? `${GROUPS[this.group].replace(/s$/, "")} ${found.index + 1}, ` : ""}row ${found.row + 1}, column ${found.column + 1}` +
        (found.view.kind === "joined"
          ? ""
          : `: token ${number(found.place + 1)} of ${number(row.tokens)}`)
      : this.size
        ? this.hint
        : "";
    this.draw();
  }

  /** The views that are drawn, and the rectangle in pixels of the original that all of it takes. */
  extent() {
    const views = this.groups.get(this.group) ?? [];
    const all = [[0, 0, ...this.size], ...views.map((view) => view.region)];
    return [
      views,
      [0, 1].map((axis) => Math.min(...all.map((region) => region[axis]))),
      [2, 3].map((axis) => Math.max(...all.map((region) => region[axis]))),
    ];
  }

  draw() {
    const { canvas, attachment } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    if (!this.size) {
      canvas.setAttribute("aria-label", "No picture");
      return;
    }
    const [views, low, high] = this.extent();
    const size = [high[0] - low[0], high[1] - low[1]];
    const margin = 12;
    this.scale =
      Math.min((width - 2 * margin) / size[0], (height - 2 * margin) / size[1]) * this.zoom;
    this.origin = [width, height].map(
      (side, axis) => side / 2 + this.pan[axis] - (low[axis] + size[axis] / 2) * this.scale,
    );
    const place = ([x1, y1, x2, y2]) => [
      this.origin[0] + x1 * this.scale,
      this.origin[1] + y1 * this.scale,
      (x2 - x1) * this.scale,
      (y2 - y1) * this.scale,
    ];
    pen.fillStyle = getComputedStyle(canvas).getPropertyValue("--pad");
    for (const view of views) pen.fillRect(...place(view.region)); // what the processor pads
    pen.imageSmoothingQuality = "high";
    const whole = place([0, 0, ...this.size]);
    pen.fillStyle = "#fff";
    if (attachment.picture) pen.drawImage(attachment.picture, ...whole);
    else pen.fillRect(...whole);
    if (this.layers.seen && attachment.picture)
      for (const view of views) drawSeen(pen, attachment, view, place(view.region));
    if (this.layers.grid)
      for (const view of views)
        drawGrid(pen, view, place(view.region), {
          merge: mergeOf(this.row),
          isFramed: views.length > 1,
        });
    if (this.hovered) this.drawCell(pen, this.hovered, place(this.hovered.view.region));
    this.drawBoxes(pen, place);
    const grid = views[0]?.columns
      ? `, a grid of ${views[0].columns} by ${views[0].rows} tokens`
      : "";
    const boxes = this.boxes.length ? `, ${plural(this.boxes.length, "marked place")}` : "";
    canvas.setAttribute(
      "aria-label",
      `${attachment.name}${grid}${boxes}. Plus and minus zoom, arrows move.`,
    );
  }

  drawCell(pen, { view, column, row }, [x, y, width, height]) {
    const [w, t] = [width / view.columns, height / view.rows];
    pen.fillStyle = "rgb(35 70 220 / 0.3)";
    pen.fillRect(x + column * w, y + row * t, w, t);
    pen.lineWidth = 2;
    pen.strokeStyle = "#fff";
    pen.strokeRect(x + column * w, y + row * t, w, t);
  }

  drawBoxes(pen, place) {
    const shown = this.shown ?? this.row;
    if (!shown?.region) return;
    for (const [index, { box, label }] of this.boxes.entries()) {
      const [x, y, width, height] = place(toOriginal(box, this.unit, shown));
      const color = BOX_COLORS[index % BOX_COLORS.length];
      pen.lineWidth = 5;
      pen.strokeStyle = "rgb(255 255 255 / 0.9)";
      pen.strokeRect(x, y, width, height);
      pen.lineWidth = 2.5;
      pen.strokeStyle = color;
      pen.strokeRect(x, y, width, height);
      const text = label || (this.boxes.length > 1 ? String(index + 1) : "");
      if (!text) continue;
      pen.font = "600 12px system-ui, sans-serif";
      pen.fillStyle = color;
      pen.fillRect(x - 1, y - 19, pen.measureText(text).width + 12, 19);
      pen.fillStyle = "#fff";
      pen.fillText(text, x + 5, y - 5);
    }
  }
}

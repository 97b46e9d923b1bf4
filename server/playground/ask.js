// The page to ask: a conversation about pictures, with what they cost and how they are seen.
import { getJson, streamChat, urlOf } from "./api.js";
import { costsOf, isSeen, partOf, release } from "./attachments.js";
import { boxesOf } from "./boxes.js";
import { LANGUAGES } from "./code.js";
import { Composer } from "./composer.js";
import { announce, copyText, duration, h, icon, iconButton, number, plural } from "./dom.js";
import { cacheBadge, errorCard, nameOf, preview, sampleFace } from "./faces.js";
import { Inspector } from "./inspector.js";
import { prose } from "./prose.js";
import { stageBar } from "./stages.js";

let context = null;
let page = null;

class AskPage {
  turns = [];
  questions = [];
  running = null;

  constructor(root) {
    this.log = h("div", { class: "turns" });
    this.suggestions = h("div", { class: "suggestions" });
    this.composer = new Composer(root, {
      send: (question) => this.send(question),
      stop: () => this.running?.abort(),
      inspect: (attachment, openSheet) => this.inspect(attachment, openSheet),
      remove: (attachment) => this.leave(attachment),
      price: (attachment) => this.reprice(attachment),
    });
    this.inspector = new Inspector();
    root.append(
      h("h1", { class: "hidden" }, "Ask about a picture"),
      h(
        "div",
        { class: "talk" },
        this.log,
        h("div", { class: "foot" }, this.suggestions, this.composer.form),
      ),
      this.inspector.root,
    );
    this.welcome();
    this.composer.text.focus({ preventScroll: true });
  }

  // ------------------------------------------------------------------ conversation

  send({ text, attachments, choices }) {
    const turn = { text: text || "Describe the image.", attachments, choices, answer: "" };
    if (!this.turns.length) this.log.replaceChildren();
    this.chosen = null;
    this.turns.push(turn);
    turn.body = h("div", { class: "answer" });
    turn.element = h("article", { class: "turn" }, this.questionOf(turn), turn.body);
    this.log.append(turn.element);
    this.run(turn);
  }

  questionOf(turn) {
    const pictures = turn.attachments.map((each) =>
      h(
        "button",
        {
          type: "button",
          class: "thumb",
          title: each.name,
          "aria-label": `Show ${each.name}`,
          onclick: () => this.inspect(each, true),
        },
        preview(each),
      ),
    );
    return h(
      "div",
      { class: "question" },
      pictures.length > 0 && h("div", { class: "pictures" }, pictures),
      h("p", {}, turn.text),
    );
  }

  /** `turn`, and those before it that have an answer. */
  answered(turn) {
    return this.turns
      .slice(0, this.turns.indexOf(turn) + 1)
      .filter((each) => each === turn || (each.answer && !each.error));
  }

  /** The conversation up to `turn`, as messages. */
  async messages(turn) {
    const messages = [];
    for (const each of this.answered(turn)) {
      const parts = await Promise.all(
        each.attachments.map((attachment) => partOf(attachment, each.choices)),
      );
      messages.push({ role: "user", content: [...parts, { type: "text", text: each.text }] });
      if (each === turn) return messages;
      messages.push({ role: "assistant", content: each.answer });
    }
    return messages;
  }

  async run(turn) {
    const control = (this.running = new AbortController());
    this.composer.setRunning(true);
    Object.assign(turn, {
      answer: "",
      timing: null,
      usage: null,
      details: null,
      grounding: null,
      error: null,
      stopped: false,
      began: performance.now(),
      firstAt: null,
    });
    const words = h("div", { class: "words waiting" });
    turn.body.replaceChildren(words);
    turn.element.scrollIntoView({ block: "end" });
    try {
      const body = {
        model: context.model(),
        messages: await this.messages(turn),
        stream: true,
        stream_options: { include_usage: true },
        include_image_details: true,
        include_grounding: true,
      };
      if (turn.choices.budget) body.max_image_tokens = turn.choices.budget;
      for await (const { chunk, timing } of streamChat(body, control.signal)) {
        if (timing) turn.timing = timing;
        if (chunk?.usage) turn.usage = chunk.usage;
        if (chunk?.image_details) turn.details = chunk.image_details;
        if (chunk?.grounding) turn.grounding = chunk.grounding;
        const piece = chunk?.choices[0]?.delta?.content;
        if (!piece) continue;
        turn.firstAt ??= performance.now();
        turn.answer += piece;
        words.classList.remove("waiting");
        words.replaceChildren(...prose(turn.answer));
        this.stayAtEnd();
      }
    } catch (error) {
      if (error.name === "AbortError") turn.stopped = true;
      else turn.error = error;
    }
    turn.ended = performance.now();
    if (this.running === control) {
      this.running = null;
      this.composer.setRunning(false);
    }
    if (this.turns.includes(turn)) await this.finish(turn, words);
  }

  stayAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    if (scrollHeight - scrollTop - clientHeight < 160) this.log.scrollTop = scrollHeight;
  }

  async finish(turn, words) {
    words.classList.remove("waiting");
    if (turn.error) turn.body.append(errorCard(turn.error, () => this.run(turn)));
    else if (turn.stopped) turn.body.append(h("p", { class: "note" }, "Stopped."));
    else announce(turn.answer);
    if (turn.usage) turn.body.append(this.facts(turn));
    const timing = turn.timing ?? seenFromHere(turn);
    if (timing) turn.body.append(stageBar(timing));
    turn.body.append(this.actions(turn));
    this.suggest();
    this.log.scrollTop = this.log.scrollHeight;
    await this.complete(turn).catch(() => {}); // the answer is what counts
    if (words.isConnected) this.showBoxes(turn); // it may be asked again by now
  }

  /** Ask for the costs of pictures that were sent before they were known. */
  async complete(turn) {
    if (turn.error || turn.attachments.every((each) => each.row || !isSeen(each))) return;
    const { rows } = await costsOf(turn.attachments, turn.choices);
    for (const each of turn.attachments) {
      const found = rows.get(each.id) ?? [];
      Object.assign(each, { row: found[0], rowCount: found.length });
      this.reprice(each);
    }
  }

  /** One line of numbers: what the answer cost, and what was cached. */
  facts(turn) {
    const { usage, details } = turn;
    const image = usage.prompt_tokens_details?.image_tokens ?? 0;
    const cached = (details ?? []).map((each) => each.cached);
    const facts = [
      `${plural(usage.prompt_tokens, "token")} in${image ? `, ${number(image)} of pictures` : ""}`,
      `${number(usage.completion_tokens)} out`,
      turn.firstAt && `first word after ${duration(turn.firstAt - turn.began)}`,
    ];
    const badge = cached.length ? cacheBadge(cached) : null;
    return h(
      "p",
      { class: "facts" },
      facts.filter(Boolean).map((fact) => h("span", {}, fact)),
      badge,
    );
  }

  actions(turn) {
    const code = h("div", { class: "code", hidden: true });
    const toggle = h(
      "button",
      {
        type: "button",
        class: "quiet",
        "aria-expanded": "false",
        onclick: () => this.showCode(turn, code, toggle),
      },
      icon("code"),
      "Code",
    );
    return h(
      "div",
      {},
      h(
        "div",
        { class: "row actions" },
        turn.answer &&
          h(
            "button",
            {
              type: "button",
              class: "quiet",
              onclick: (event) => copyText(turn.answer, event.currentTarget),
            },
            icon("copy"),
            "Copy",
          ),
        turn === this.turns.at(-1) &&
          h(
            "button",
            { type: "button", class: "quiet", onclick: () => !this.running && this.run(turn) },
            icon("retry"),
            "Again",
          ),
        toggle,
      ),
      code,
    );
  }

  showCode(turn, holder, toggle) {
    holder.hidden = !holder.hidden;
    toggle.setAttribute("aria-expanded", String(!holder.hidden));
    if (holder.childElementCount) return;
    const question = {
      model: context.model(),
      attachments: turn.attachments,
      text: turn.text,
      choices: turn.choices,
    };
    const block = h("pre", { tabindex: "0" }, h("code"));
    const tabs = Object.entries(LANGUAGES).map(([name, write]) =>
      h(
        "button",
        {
          type: "button",
          class: "quiet",
          "aria-pressed": "false",
          onclick: (event) => {
            block.firstChild.textContent = write(question);
            for (const tab of tabs)
              tab.setAttribute("aria-pressed", String(tab === event.currentTarget));
          },
        },
        name,
      ),
    );
    holder.append(
      h(
        "div",
        { class: "row" },
        tabs,
        h("span", { class: "spring" }),
        iconButton("copy", "Copy the code", (event) =>
          copyText(block.textContent, event.currentTarget),
        ),
      ),
      block,
    );
    tabs[0].click();
  }

  // ------------------------------------------------------------------ inspector

  /** Show the new cost of a picture, if it is the one that is looked at. */
  reprice(attachment) {
    if (this.inspector.attachment === attachment) this.inspector.update({ row: attachment.row });
  }

  /** Look at another picture if this one is looked at. */
  leave(attachment) {
    if (this.inspector.attachment !== attachment) return;
    const other = this.composer.attachments.find((each) => each.width);
    if (other) this.inspect(other);
    else this.inspector.clear();
  }

  inspect(attachment, openSheet = false) {
    const { row, shown, boxes = [] } = attachment;
    this.inspector.show({ attachment, row, shown, boxes }, openSheet);
  }

  /** Note how the pictures of the conversation were shown, and draw the boxes of an answer on the
   * last one, which it is probably about. */
  showBoxes(turn) {
    const pictures = this.answered(turn).flatMap((each) => each.attachments);
    let index = 0;
    for (const each of pictures.filter(isSeen)) {
      each.shown = turn.details?.[index] ?? each.shown;
      index += each.rowCount ?? 1;
    }
    const attachment = pictures.findLast((each) => each.width);
    const boxes = boxesOf(turn.grounding);
    if (!attachment) return;
    if (boxes.length || turn.attachments.includes(attachment)) {
      attachment.boxes = boxes;
      this.inspect(attachment);
    }
    if (!boxes.length) return;
    const show = () => this.inspect(Object.assign(attachment, { boxes }), true);
    const label = `${number(boxes.length)} ${boxes.length > 1 ? "boxes" : "box"} on ${attachment.name}`;
    turn.body.children[0].after(
      h("button", { type: "button", class: "quiet boxes", onclick: show }, icon("box"), label),
    );
  }

  // ------------------------------------------------------------------ start

  async welcome() {
    const samples = h("ul", { class: "samples", "aria-label": "Samples" });
    this.log.replaceChildren(
      h(
        "div",
        { class: "welcome" },
        h("p", { class: "display", "aria-hidden": "true" }, "Ask about a picture"),
        h(
          "p",
          {},
          "Drop, paste or choose pictures, PDFs or clips. You see what they cost before you send them.",
        ),
        samples,
      ),
    );
    let listed = [];
    try {
      listed = await getJson("playground/samples.json");
    } catch {
      return; // the page works without them
    }
    samples.append(
      ...listed.map((sample) =>
        h(
          "li",
          {},
          h(
            "button",
            { type: "button", title: sample.questions[0], onclick: () => this.useSample(sample) },
            sampleFace(sample),
            h("span", {}, nameOf(sample.files[0])),
          ),
        ),
      ),
    );
  }

  restart() {
    this.running?.abort();
    this.turns.flatMap((turn) => turn.attachments).forEach(release);
    this.turns = [];
    this.questions = [];
    this.chosen = null;
    this.inspector.clear();
    this.composer.start([], [], "");
    this.suggest();
    this.welcome();
  }

  async useSample(sample) {
    this.chosen = sample;
    const blobs = await Promise.all(
      sample.files.map(async (name) => (await fetch(urlOf(`playground/samples/${name}`))).blob()),
    );
    if (this.chosen !== sample) return; // another one was chosen meanwhile, or a file was sent
    await this.composer.start(blobs, sample.files, sample.questions[0]);
    this.questions = sample.questions;
    this.suggest();
  }

  suggest() {
    const asked = new Set(this.turns.map((turn) => turn.text));
    const left = this.questions.filter((question) => !asked.has(question)).slice(0, 6);
    const anew =
      this.turns.length > 0 &&
      h(
        "button",
        { type: "button", class: "chip anew", onclick: () => this.restart() },
        icon("attach"),
        "New conversation",
      );
    this.suggestions.replaceChildren(
      ...[anew].filter(Boolean),
      ...left.map((question) =>
        h(
          "button",
          { type: "button", class: "chip", onclick: () => !this.running && this.send(question) },
          question,
        ),
      ),
    );
  }
}

/** The stages that a page can time by itself, where the server does not tell its own. */
function seenFromHere({ began, firstAt, ended }) {
  if (!firstAt) return null;
  return { first: firstAt - began, generate: ended - firstAt, total: ended - began };
}

export const ask = {
  show(root, given) {
    context = given;
    page ??= new AskPage(root);
  },
  /** The picture that a person has looked at last, for other pages. */
  picture: () => page?.inspector.attachment ?? null,
};

// Answers of models: the small part of Markdown that they use, as elements.
import { h } from "./dom.js";

const INLINE = /(`[^`]+`)|(\*\*[^*]+\*\*)|(\*[^*\s][^*]*\*)/g;

function inline(text) {
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(at, match.index));
    const [whole, code, bold] = match;
    if (code) parts.push(h("code", {}, whole.slice(1, -1)));
    else if (bold) parts.push(h("strong", {}, whole.slice(2, -2)));
    else parts.push(h("em", {}, whole.slice(1, -1)));
    at = match.index + whole.length;
  }
  parts.push(text.slice(at));
  return parts.filter((part) => part !== "");
}

/** Blocks of a text: paragraphs, headings, lists, code. Unfinished blocks of a stream are shown. */
export function prose(text) {
  const blocks = [];
  let code = null;
  let list = null;
  let paragraph = null;
  for (const line of text.split("\n")) {
    if (line.startsWith("```")) {
      if (code) code = null;
      else blocks.push(h("pre", { tabindex: "0" }, (code = h("code"))));
      list = paragraph = null;
    } else if (code) {
      code.append(line + "\n");
    } else if (!line.trim()) {
      list = paragraph = null;
    } else {
      const item = line.match(/^\s*(?:[-*]|(\d+)[.)])\s+(.*)/);
      const heading = line.match(/^#{1,6}\s+(.*)/);
      if (heading) {
        blocks.push(h("p", { class: "heading" }, inline(heading[1])));
        list = paragraph = null;
      } else if (item) {
        const kind = item[1] ? "ol" : "ul";
        if (list?.localName !== kind)
          blocks.push((list = h(kind, item[1] ? { start: item[1] } : {})));
        list.append(h("li", {}, inline(item[2])));
        paragraph = null;
      } else if (paragraph) {
        paragraph.append("\n", ...inline(line));
      } else {
        blocks.push((paragraph = h("p", {}, inline(line))));
        list = null;
      }
    }
  }
  return blocks;
}

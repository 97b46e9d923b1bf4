// Boxes in answers, in the notations of the usual models.

const NUMBER = "\\s*(-?\\d+(?:\\.\\d+)?)\\s*";
const FOUR = `[\\[(]${[NUMBER, NUMBER, NUMBER, NUMBER].join(",")}[\\])]`; // [x1, y1, x2, y2]
const CORNERS = `\\(${NUMBER},${NUMBER}\\)\\s*,\\s*\\(${NUMBER},${NUMBER}\\)`; // Qwen2-VL
const PLACES = "<loc(\\d{4})>".repeat(4); // PaliGemma: y1, x1, y2, x2 in 1024ths
const BOX = new RegExp(`${FOUR}|${CORNERS}|${PLACES}`, "g");
const LABEL_BEFORE = /"(?:label|name)"\s*:\s*"([^"]*)"[^{}]*$/;
const LABEL_AFTER = /^[^{}]*?"(?:label|name)"\s*:\s*"([^"]*)"/;

function cornersOf(groups) {
  const given = groups.filter((each) => each !== undefined).map(Number);
  if (groups[8] === undefined) return given;
  const [y1, x1, y2, x2] = given.map((each) => (each * 1000) / 1024);
  return [x1, y1, x2, y2];
}

function labelAt(text, start, end) {
  const before = LABEL_BEFORE.exec(text.slice(0, start));
  return (before ?? LABEL_AFTER.exec(text.slice(end)))?.[1] ?? "";
}

/** The boxes of a text, as `{box: [x1, y1, x2, y2], label}`, in the model's unit. Labels are those
 * of JSON objects. */
export function boxesIn(text) {
  return [...text.matchAll(BOX)]
    .map(({ 0: whole, index, ...groups }) => ({
      box: cornersOf(Array.from({ length: 12 }, (_, place) => groups[place + 1])),
      label: labelAt(text, index, index + whole.length),
    }))
    .filter(({ box: [x1, y1, x2, y2] }) => x2 > x1 && y2 > y1);
}

/** The unit that a model probably uses: pixels if a number is above 1000, else thousandths. */
export const unitOf = (boxes) =>
  boxes.some(({ box }) => Math.max(...box) > 1000) ? "pixels" : "thousandths";

/**
 * A box in pixels of the upright original. `shown` has `processed_width`, `processed_height` and
 * `region`, as in `image_details`: models see the processed picture, which shows the region.
 */
export function toOriginal([x1, y1, x2, y2], unit, shown) {
  const [left, top, right, bottom] = shown.region;
  const isPixels = unit === "pixels";
  const [width, height] = isPixels ? [shown.processed_width, shown.processed_height] : [1000, 1000];
  const x = (value) => left + (value / width) * (right - left);
  const y = (value) => top + (value / height) * (bottom - top);
  return [x(x1), y(y1), x(x2), y(y2)];
}

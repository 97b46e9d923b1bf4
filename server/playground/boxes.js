// Boxes in answers, which the server has read in the notations of the usual models.

/** The boxes in `grounding` of an answer, as `{box: [x1, y1, x2, y2], label, unit}`: in pixels of the
 * processed picture, or else in thousandths of it. */
export function boxesOf(grounding) {
  return (grounding ?? [])
    .filter(({ numbers: [x1, y1, x2, y2] }) => x2 > x1 && y2 > y1)
    .map(({ numbers, scale, label }) => ({
      box: scale === "pixels" ? numbers : numbers.map((each) => (each * 1000) / scale),
      label: label ?? "",
      unit: scale === "pixels" ? "pixels" : "thousandths",
    }));
}

/** The unit of boxes: pixels if the server or a number above 1000 says so, else thousandths. */
export const unitOf = (boxes) =>
  boxes.some(({ box, unit }) => unit === "pixels" || Math.max(...box) > 1000)
    ? "pixels"
    : "thousandths";

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

// What the encoder sees of a picture, from the rows of `/v1/images/tokens`, and how it is drawn.

// Widths of cells on the screen, in pixels: narrower ones get no lines, then thin ones, then bold
// ones, and then also those of their patches.
const LEAST_CELL = 4;
const BOLD_FROM = 10;
const PATCHES_FROM = 28;

/** The views of a picture by kind, in the order in which they stand in the prompt. */
export function viewGroups(row) {
  const groups = new Map();
  for (const view of row?.views ?? [])
    groups.set(view.kind, [...(groups.get(view.kind) ?? []), view]);
  return groups;
}

/** The kind of views that shows most of a picture; null without any. */
export const mainGroup = (groups) =>
  ["tile", "whole", "overview"].find((kind) => groups.has(kind)) ?? null;

/** How many patches a token has along each side; 0 if that is not known. */
export function mergeOf(row) {
  const view = row?.views?.find((each) => each.columns && each.kind !== "joined");
  if (!view || !row.patch_size) return 0;
  return Math.round(view.width / view.columns / row.patch_size);
}

/** The view with as many pixels as the encoder gets, in a rectangle of the screen. */
export function drawSeen(pen, attachment, view, [x, y, width, height]) {
  const small = new OffscreenCanvas(view.width, view.height);
  const brush = small.getContext("2d");
  const [left, top, right, bottom] = view.region;
  const [sx, sy] = [view.width / (right - left), view.height / (bottom - top)];
  brush.imageSmoothingQuality = "high";
  brush.drawImage(
    attachment.picture,
    -left * sx,
    -top * sy,
    attachment.width * sx,
    attachment.height * sy,
  );
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, x, y, width, height);
  pen.imageSmoothingEnabled = true;
}

/** The grid of a view's tokens, in a rectangle of the screen, with the patches of large tokens. */
export function drawGrid(pen, view, [x, y, width, height], { merge, isFramed }) {
  const cell = view.columns ? width / view.columns : 0;
  const lines = (columns, rows, color, thickness) => {
    pen.beginPath();
    for (let column = 1; column < columns; column++) {
      pen.moveTo(x + (width * column) / columns, y);
      pen.lineTo(x + (width * column) / columns, y + height);
    }
    for (let row = 1; row < rows; row++) {
      pen.moveTo(x, y + (height * row) / rows);
      pen.lineTo(x + width, y + (height * row) / rows);
    }
    pen.strokeStyle = color;
    pen.lineWidth = thickness;
    pen.stroke();
  };
  if (merge > 1 && cell > PATCHES_FROM && view.kind !== "joined")
    lines(view.columns * merge, view.rows * merge, "rgb(90 120 255 / 0.35)", 0.75);
  if (cell > BOLD_FROM) {
    lines(view.columns, view.rows, "rgb(255 255 255 / 0.75)", 2);
    lines(view.columns, view.rows, "rgb(35 70 220 / 0.85)", 1);
  } else if (cell > LEAST_CELL) {
    lines(view.columns, view.rows, "rgb(35 70 220 / 0.5)", 0.6);
  }
  for (const [color, thickness] of [
    ["rgb(255 255 255 / 0.85)", 3],
    ["rgb(35 70 220)", 1.5],
  ]) {
    pen.lineWidth = isFramed ? thickness + 1.5 : thickness;
    pen.strokeStyle = color;
    pen.strokeRect(x, y, width, height);
  }
}

// Boxes in a model's answer: found in its text, mapped to the original picture, drawn on it.
import type { ShownImage } from "./answers.js";

/** A rectangle, and what the model says is in it, if it does. */
export interface Box {
  left: number;
  top: number;
  right: number;
  bottom: number;
  label?: string;
}

const NUMBER = String.raw`\s*(-?\d+(?:\.\d+)?)\s*`;
// [left, top, right, bottom], or Qwen-VL's (left, top),(right, bottom)
const BOX = new RegExp(
  String.raw`\[${NUMBER},${NUMBER},${NUMBER},${NUMBER}\]` +
    String.raw`|\(${NUMBER},${NUMBER}\)\s*,?\s*\(${NUMBER},${NUMBER}\)`,
  "g",
);
const LABEL = /"label"\s*:\s*"([^"]*)"/;
const COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080"];

/**
 * The boxes in `text`, in the model's coordinates, in the order of the text: `[left, top, right,
 * bottom]`, also in JSON, where a "label" of the same object becomes the label, and `(left,
 * top),(right, bottom)`.
 */
export function findBoxes(text: string): Box[] {
  return Array.from(text.matchAll(BOX), (match) => {
    const numbers = match.slice(1).filter((group) => group !== undefined);
    const [left, top, right, bottom] = numbers.map(Number) as [number, number, number, number];
    const label = labelAround(text, match.index, match.index + match[0].length);
    return { left, top, right, bottom, ...(label === undefined ? {} : { label }) };
  });
}

/** The label in the JSON object that contains this part of the text. */
function labelAround(text: string, from: number, to: number): string | undefined {
  const start = text.lastIndexOf("{", from);
  const end = text.indexOf("}", to);
  return start < 0 || end < 0 ? undefined : LABEL.exec(text.slice(start, end))?.[1];
}

/**
 * `box` in pixels of the original picture. `scale` is the range of the model's coordinates: 1000
 * for thousandths, 1 for fractions, null for pixels of the processed picture, as Qwen2.5-VL gives
 * them. `shown` tells which region of the original the model saw, at which size.
 */
export function toOriginal(box: Box, shown: ShownImage, scale: number | null = 1000): Box {
  const [left, top, right, bottom] = shown.region;
  const across = (right - left) / (scale ?? shown.processed_width ?? shown.width);
  const down = (bottom - top) / (scale ?? shown.processed_height ?? shown.height);
  return {
    ...box,
    left: left + box.left * across,
    top: top + box.top * down,
    right: left + box.right * across,
    bottom: top + box.bottom * down,
  };
}

/**
 * Draws the picture on a canvas, in its own size, with boxes in its own pixels and their labels.
 * Only in browsers. Without `canvas`, it makes a new one.
 */
export async function drawBoxes(
  picture: ImageBitmapSource,
  boxes: Iterable<Box>,
  canvas?: HTMLCanvasElement | OffscreenCanvas,
): Promise<HTMLCanvasElement | OffscreenCanvas> {
  const bitmap = await createImageBitmap(picture);
  const { width, height } = bitmap;
  const drawn = canvas ?? new OffscreenCanvas(width, height);
  drawn.width = width;
  drawn.height = height;
  const pen = drawn.getContext("2d") as CanvasRenderingContext2D;
  pen.drawImage(bitmap, 0, 0);
  bitmap.close();
  const longest = Math.max(width, height);
  const size = Math.max(10, Math.round(longest / 50));
  pen.lineWidth = Math.max(2, Math.round(longest / 300));
  pen.font = `${size}px sans-serif`;
  pen.textBaseline = "top";
  [...boxes].forEach(({ left, top, right, bottom, label }, index) => {
    const color = COLORS[index % COLORS.length]!;
    const [x, y] = [Math.min(left, right), Math.min(top, bottom)];
    pen.strokeStyle = color;
    pen.strokeRect(x, y, Math.abs(right - left), Math.abs(bottom - top));
    if (!label) return;
    const at = [x + pen.lineWidth, y + pen.lineWidth] as const;
    pen.fillStyle = "white";
    pen.fillRect(...at, pen.measureText(label).width, size);
    pen.fillStyle = color;
    pen.fillText(label, ...at);
  });
  return drawn;
}

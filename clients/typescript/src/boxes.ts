// Boxes and points in a model's answer: found in its text, mapped to the original picture, drawn on it.
import type { ShownImage } from "./answers.js";
import { findPlaces } from "./grounding.js";

/**
 * A rectangle, and what the model says is in it, if it does. `scale` is the range of the
 * coordinates, if the answer's notation tells it.
 */
export interface Box {
  left: number;
  top: number;
  right: number;
  bottom: number;
  label?: string;
  scale?: number;
}

/** A point, and what the model says is there, if it does. `scale` is as in `Box`. */
export interface Point {
  x: number;
  y: number;
  label?: string;
  scale?: number;
}

const COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080"];

/**
 * The boxes in `text`, in the model's coordinates, in the order of the text. The notations are those
 * of Qwen-VL, InternVL, MiniCPM-V, DeepSeek-VL2, GLM-V, PaliGemma, Florence-2, Kosmos-2, Gemma and
 * Gemini, JSON, and plain `[left, top, right, bottom]`.
 */
export function findBoxes(text: string): Box[] {
  return findPlaces(text).flatMap(({ numbers, ...rest }) => {
    if (numbers.length !== 4) return [];
    const [left, top, right, bottom] = numbers as [number, number, number, number];
    return [{ left, top, right, bottom, ...rest }];
  });
}

/** As `findBoxes`, for points, which Molmo and others write. */
export function findPoints(text: string): Point[] {
  return findPlaces(text).flatMap(({ numbers, ...rest }) => {
    if (numbers.length !== 2) return [];
    const [x, y] = numbers as [number, number];
    return [{ x, y, ...rest }];
  });
}

/**
 * `box` in pixels of the original picture. `scale` is the range of the model's coordinates, unless
 * the box has its own: 1000 for thousandths, 1 for fractions, null for pixels of the processed
 * picture, as Qwen2.5-VL gives them. `shown` tells which region of the original the model saw, at
 * which size.
 */
export function toOriginal(box: Box, shown: ShownImage, scale: number | null = 1000): Box {
  const { scale: own, ...rest } = box;
  const [left, top] = mapped(box.left, box.top, shown, own ?? scale);
  const [right, bottom] = mapped(box.right, box.bottom, shown, own ?? scale);
  return { ...rest, left, top, right, bottom };
}

/** As `toOriginal`, for a point. */
export function pointToOriginal(
  point: Point,
  shown: ShownImage,
  scale: number | null = 1000,
): Point {
  const { scale: own, ...rest } = point;
  const [x, y] = mapped(point.x, point.y, shown, own ?? scale);
  return { ...rest, x, y };
}

function mapped(x: number, y: number, shown: ShownImage, scale: number | null): [number, number] {
  const [left, top, right, bottom] = shown.region;
  const across = (right - left) / (scale ?? shown.processed_width ?? shown.width);
  const down = (bottom - top) / (scale ?? shown.processed_height ?? shown.height);
  return [left + x * across, top + y * down];
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

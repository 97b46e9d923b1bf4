// What servers return, as typed objects.
import type OpenAI from "openai";

import {
  findBoxes,
  findPoints,
  pointToOriginal,
  toOriginal,
  type Box,
  type Point,
} from "./boxes.js";

/** Tokens of a request and its answer. */
export interface Usage extends OpenAI.CompletionUsage {
  prompt_tokens_details?: OpenAI.CompletionUsage.PromptTokensDetails & {
    /** Tokens of all pictures, which count as prompt tokens. Only Saccade tells. */
    image_tokens?: number;
  };
}

/** Left, top, right, bottom. */
export type Region = [number, number, number, number];

/** A picture as the model saw it. What the server does not tell is null or missing. */
export interface ShownImage {
  /** Of the caller's picture, upright, in pixels, whatever size was sent. */
  width: number;
  height: number;
  /** The part of the caller's picture that the model saw. */
  region: Region;
  processed_width?: number | null;
  processed_height?: number | null;
  tokens?: number | null;
  cached?: "none" | "features" | "embedding" | null;
  /** The frame of an animation or the page of a PDF, from 0. */
  frame?: number | null;
}

/**
 * A box or a point that the server has read in an answer (`include_grounding`). `box` or `point` is
 * in pixels of the caller's picture with the index `image`, and null if the server does not know how
 * the picture was processed.
 */
export interface Grounded {
  /** The index of the answer's choice. */
  choice: number;
  image: number;
  label: string | null;
  /** Left, top, right, bottom. */
  box?: Region | null;
  /** x, y. */
  point?: [number, number] | null;
  /** As the model wrote them, in the range `scale`. */
  numbers: number[];
  scale: number | "pixels";
}

/** What a picture would cost: `tokens` of the prompt, and `kv_bytes` of the KV cache. */
export interface ImageCost {
  width: number;
  height: number;
  processed_width: number | null;
  processed_height: number | null;
  region: Region | null;
  tokens: number;
  prompt_tokens: number;
  kv_bytes: number;
}

/** A chat completion with Saccade's fields. */
export interface Completion extends Omit<OpenAI.ChatCompletion, "usage"> {
  usage?: Usage;
  image_details?: ShownImage[] | null;
  /** In pixels of the pictures that were sent: `Answer.grounding` is in the caller's. */
  grounding?: Grounded[] | null;
}

/** The answer to a question. */
export class Answer {
  constructor(
    /** What the server sent. */
    readonly completion: Completion,
    /** The pictures as the model saw them, in the order of the prompt; empty if unknown. */
    readonly images: readonly ShownImage[],
    /** Of the response, such as `server-timing`. */
    readonly headers: Headers,
    /** What the server was asked to read in the text (`include_grounding`). */
    readonly grounding?: readonly Grounded[],
  ) {}

  /** The text of the first choice. */
  get text(): string {
    return this.completion.choices[0]?.message.content ?? "";
  }

  /** Why the first choice ended. */
  get finishReason(): OpenAI.ChatCompletion.Choice["finish_reason"] | undefined {
    return this.completion.choices[0]?.finish_reason;
  }

  get usage(): Usage | undefined {
    return this.completion.usage;
  }

  /**
   * The boxes in the text, in pixels of the caller's picture with the index `image`. `scale` is the
   * range of the model's coordinates: see `toOriginal`. Throws RangeError if nothing is known about
   * this picture.
   */
  boxes(scale: number | null = 1000, image = 0): Box[] {
    const shown = this.shown(image);
    return findBoxes(this.text).map((box) => toOriginal(box, shown, scale));
  }

  /** As `boxes`, for the points in the text. */
  points(scale: number | null = 1000, image = 0): Point[] {
    const shown = this.shown(image);
    return findPoints(this.text).map((point) => pointToOriginal(point, shown, scale));
  }

  private shown(image: number): ShownImage {
    const shown = this.images[image];
    if (shown === undefined) throw new RangeError(`nothing is known about picture ${image}`);
    return shown;
  }
}

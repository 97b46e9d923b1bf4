// An answer that arrives piece by piece.
import type OpenAI from "openai";

import type { Answer, Completion } from "./answers.js";
import { SaccadeError, UnexpectedAnswer } from "./errors.js";

type Chunk = OpenAI.ChatCompletionChunk;

/**
 * Pieces of text as they arrive; then `answer` has all of it. Leaving the loop early stops the
 * server's work.
 */
export class AnswerStream implements AsyncIterable<string> {
  readonly #chunks: AsyncIterable<Chunk>;
  readonly #finish: (completion: Completion) => Answer;
  #answer: Answer | undefined;

  /** @internal */
  constructor(chunks: AsyncIterable<Chunk>, finish: (completion: Completion) => Answer) {
    this.#chunks = chunks;
    this.#finish = finish;
  }

  /** The whole answer, once the stream has been read. */
  get answer(): Answer {
    if (this.#answer === undefined)
      throw new SaccadeError("the stream has not been read to its end");
    return this.#answer;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<string, void, undefined> {
    const document: Partial<Chunk> = {};
    let text = "";
    let finishReason: Chunk["choices"][number]["finish_reason"] = null;
    for await (const chunk of this.#chunks) {
      const known = Object.entries(chunk).filter(([, value]) => value !== null);
      Object.assign(document, Object.fromEntries(known));
      const choice = chunk.choices.find(({ index }) => index === 0);
      finishReason = choice?.finish_reason ?? finishReason;
      const piece = choice?.delta.content;
      if (!piece) continue;
      text += piece;
      yield piece;
    }
    if (finishReason === null)
      throw new UnexpectedAnswer("the stream ended before the answer was complete");
    const message = { role: "assistant" as const, content: text, refusal: null };
    const choice = { index: 0, message, finish_reason: finishReason, logprobs: null };
    this.#answer = this.#finish({
      ...(document as Chunk),
      object: "chat.completion",
      choices: [choice],
    } as Completion);
  }
}

import OpenAI, { toFile, type ClientOptions as OpenAIOptions } from "openai";

import { routingHeaders } from "./affinity.js";
import { Answer, type Completion, type ImageCost, type ShownImage } from "./answers.js";
import { sha256 } from "./bytes.js";
import { refusal, SaccadeError, UnexpectedAnswer, UnusableMedia } from "./errors.js";
import { formatOf } from "./format.js";
import { media, Pdf, Picture, Video, type MediaSource } from "./media.js";
import {
  askedOf,
  inOriginals,
  isPart,
  prepare,
  type ContentItem,
  type Message,
  type Prepared,
} from "./prepare.js";
import { Remembered } from "./remembered.js";
import { AnswerStream } from "./stream.js";
import { Targets, type Asked } from "./targets.js";

export const DEFAULT_URL = "http://127.0.0.1:8000/v1";

// Picture names that the server is known to have, and costs asked for at a time.
const NAMES = 100_000;
const COSTS_AT_A_TIME = 1000;
const OPENAI_HOST = "api.openai.com";
const PROBE_TIMEOUT_MS = 10_000;

/**
 * Those of the `openai` package, or a client of it in `openai`, and these. `baseURL` is by default
 * OPENAI_BASE_URL, or http://127.0.0.1:8000/v1. In a page, a client with an `apiKey` needs
 * `dangerouslyAllowBrowser`: everyone who opens the page can read the key.
 */
export interface ClientOptions extends OpenAIOptions {
  openai?: OpenAI;
  /** Used where a call names none; by default the first that the server lists. */
  model?: string;
  /** Send pictures as small as the model will see them. Needs Saccade as the server. */
  resize?: boolean;
  /** Send a picture once, and then its name. Needs Saccade as the server. */
  reuse?: boolean;
  /** Of pictures that become JPEG, from 1 to 100. */
  quality?: number;
}

type RequestFields = Omit<
  OpenAI.ChatCompletionCreateParamsNonStreaming,
  "messages" | "model" | "stream"
>;

/** Fields of the request, and what the client does with it. */
export interface AskOptions extends Partial<RequestFields> {
  model?: string;
  /** A budget for the tokens of all pictures. Only with Saccade. */
  max_image_tokens?: number;
  /**
   * The server reads boxes and points in the answer. `scale` is the range of the model's numbers
   * where its notation does not tell it, `image` the index of the picture. Only with Saccade.
   */
  include_grounding?: boolean | { scale?: number | "pixels"; image?: number };
  /** Further fields, which only this server knows. */
  extra_body?: Record<string, unknown>;
  /** The question follows its messages, and is added to them with its answer. */
  conversation?: Conversation;
  signal?: AbortSignal;
}

/** The messages so far. Each question is added with its answer, so ask one at a time. */
export class Conversation {
  messages: Message[];

  constructor({ system, messages = [] }: { system?: string; messages?: Message[] } = {}) {
    this.messages =
      system === undefined ? messages : [{ role: "system", content: system }, ...messages];
  }
}

interface Exchange {
  messages: readonly Message[];
  prepared: Prepared;
  conversation: Conversation | undefined;
}

/** A client of one server. What the server refuses is an `APIError` of the `openai` package. */
export class Client {
  /** Sends all requests, and has the other routes of the API. */
  readonly openai: OpenAI;
  readonly #options: ClientOptions;
  readonly #targets = new Targets((pictures, budget, signal) =>
    this.#costsIfTold(pictures, budget, signal),
  );
  readonly #known = new Remembered<true>(NAMES);
  readonly #uploads = new Remembered<string>(NAMES);
  #model: string | undefined;
  #isSaccade: boolean | undefined;
  #tellsCosts = true;

  constructor(options: ClientOptions = {}) {
    const { openai, model, resize, reuse, quality, ...more } = options;
    this.openai = openai ?? new OpenAI(withDefaults(more));
    this.#options = options;
    this.#model = model;
    if (this.#isOpenAI) this.#isSaccade = false;
  }

  /** Ask about pictures, PDFs and videos, which are put before the question. */
  async ask(
    question: string,
    media: MediaSource | readonly MediaSource[] = [],
    options: AskOptions = {},
  ): Promise<Answer> {
    return this.chat(await asked(question, media), options);
  }

  /** Send messages of the API; a content may be a list of texts, media and parts. */
  async chat(messages: readonly Message[], options: AskOptions = {}): Promise<Answer> {
    const { data, response, exchange } = await this.#send(messages, options, false);
    return answerOf(data as unknown as Completion, response, exchange);
  }

  /** As `ask`; the answer comes in pieces of text. */
  async stream(
    question: string,
    media: MediaSource | readonly MediaSource[] = [],
    options: AskOptions = {},
  ): Promise<AnswerStream> {
    const { data, response, exchange } = await this.#send(
      await asked(question, media),
      options,
      true,
    );
    return new AnswerStream(data, (completion) => answerOf(completion, response, exchange));
  }

  /** Messages with media as plain JSON, resized, for any other client of the API. */
  async messages(
    messages: readonly Message[],
    options: { max_image_tokens?: number; signal?: AbortSignal } = {},
  ): Promise<OpenAI.ChatCompletionMessageParam[]> {
    return (await this.#prepared(messages, options)).written();
  }

  /** What pictures cost, in their order, without asking the model. Only Saccade answers. */
  async costs(
    sources: MediaSource | readonly MediaSource[],
    options: { max_image_tokens?: number; signal?: AbortSignal } = {},
  ): Promise<ImageCost[]> {
    const { max_image_tokens: budget, signal } = options;
    const prepared = await prepare([{ role: "user", content: await loaded(sources) }], {
      isSaccade: true,
      targets: undefined,
      quality: this.#quality,
      budget,
      signal,
    });
    const sized = prepared.placed.flatMap(({ medium, content }) => {
      if (!(medium instanceof Picture) || !(content instanceof Uint8Array)) return [];
      const format = formatOf(content);
      const isSized = format.size && medium.options.frames === undefined;
      return isSized ? [askedOf({ medium, format })] : [];
    });
    if (sized.length === prepared.placed.length) return this.#costs(sized, budget, signal);
    const body = { messages: prepared.written(), max_image_tokens: budget };
    return this.#postCosts(body, signal);
  }

  /** Upload a picture or a PDF once, and get a reference to send in its place. */
  async upload(
    source: MediaSource,
    { lifetime_s }: { lifetime_s?: number } = {},
  ): Promise<Picture | Pdf> {
    const medium = await media(source);
    const content = await medium.content();
    if (medium instanceof Video || typeof content === "string")
      throw new UnusableMedia("only pictures and PDFs can be uploaded");
    if (content === undefined) return medium;
    const key = await sha256(content);
    let id = key && this.#uploads.get(key);
    if (id === undefined || !(await this.#hasFile(id))) {
      const isPdf = medium instanceof Pdf;
      const file = await this.openai.files.create({
        file: await toFile(content, isPdf ? medium.name : "picture"),
        purpose: isPdf ? "user_data" : "vision",
        ...(lifetime_s === undefined
          ? {}
          : { expires_after: { anchor: "created_at", seconds: lifetime_s } }),
      });
      id = file.id;
      if (key !== undefined) this.#uploads.set(key, id);
    }
    return medium instanceof Pdf
      ? new Pdf(undefined, medium.pages, id, medium.name)
      : new Picture(undefined, medium.options, id);
  }

  /** Delete an upload. */
  async delete(fileId: string): Promise<void> {
    await this.openai.files.delete(fileId);
  }

  // -------------------------------------------------------------------- questions

  #send(
    messages: readonly Message[],
    options: AskOptions,
    stream: false,
  ): Sent<OpenAI.ChatCompletion>;
  #send(
    messages: readonly Message[],
    options: AskOptions,
    stream: true,
  ): Sent<AsyncIterable<OpenAI.ChatCompletionChunk>>;
  async #send(asked: readonly Message[], options: AskOptions, stream: boolean): Sent<unknown> {
    const { conversation, signal, extra_body, ...fields } = options;
    const messages = [...(conversation?.messages ?? []), ...asked];
    const prepared = await this.#prepared(messages, options);
    const body = {
      ...(prepared.isSaccade ? { include_image_details: true } : {}),
      ...fields,
      ...extra_body,
      model: fields.model ?? (await this.#defaultModel(signal)),
      ...(stream ? { stream, stream_options: { include_usage: true } } : {}),
    };
    const names =
      prepared.isSaccade && this.#options.reuse !== false ? prepared.names() : new Set<string>();
    const known = new Set([...names].filter((name) => this.#known.has(name)));
    const send = (without: ReadonlySet<string>) => {
      const written: unknown = { ...body, messages: prepared.written(names, without) };
      return this.openai.chat.completions
        .create(written as OpenAI.ChatCompletionCreateParamsNonStreaming, {
          headers: this.#headers(prepared),
          ...(signal ? { signal } : {}),
        })
        .withResponse();
    };
    const { data, response } = await send(known).catch((error: unknown) => {
      if (refusal(error).code !== "unknown_image" || known.size === 0) throw error;
      return send(new Set());
    });
    for (const name of names) this.#known.set(name, true);
    return { data, response, exchange: { messages, prepared, conversation } };
  }

  async #prepared(
    messages: readonly Message[],
    { max_image_tokens, signal }: { max_image_tokens?: number; signal?: AbortSignal },
  ): Promise<Prepared> {
    const hasMedia = messages.some(
      ({ content }) =>
        Array.isArray(content) &&
        (content as readonly ContentItem[]).some(
          (item) => typeof item !== "string" && !isPart(item),
        ),
    );
    const isSaccade = hasMedia && (await this.#serverIsSaccade(signal));
    const targets = isSaccade && this.#tellsCosts && this.#options.resize !== false;
    return prepare(messages, {
      isSaccade,
      targets: targets ? this.#targets : undefined,
      quality: this.#quality,
      budget: max_image_tokens,
      signal,
    });
  }

  /** The deadline on the server, and the session; none for OpenAI, which has no use for them. */
  #headers({ session }: Prepared): Record<string, string> {
    if (this.#isOpenAI) return {};
    const deadline = { "X-Request-Timeout": String(this.openai.timeout / 1000) };
    const given = this.openai["_options"]?.defaultHeaders ?? {};
    return { ...deadline, ...routingHeaders(session, given) };
  }

  // -------------------------------------------------------------------- the server

  get #isOpenAI(): boolean {
    return new URL(this.openai.baseURL).host === OPENAI_HOST;
  }

  get #quality(): number {
    return this.#options.quality ?? 90;
  }

  /** Whether the server is Saccade; asked until it says so or not, and never of OpenAI. */
  async #serverIsSaccade(signal: AbortSignal | undefined): Promise<boolean> {
    if (this.#isSaccade === undefined) {
      const url = this.openai.baseURL.replace(/(\/v1)?\/?$/, "/version");
      const options = { maxRetries: 0, timeout: PROBE_TIMEOUT_MS, ...(signal ? { signal } : {}) };
      try {
        const version: unknown = await this.openai.get(url, options);
        this.#isSaccade = typeof version === "object" && version !== null && "saccade" in version;
      } catch (error) {
        // A page of another site may not be allowed to ask this, and a proxy answers 5xx meanwhile.
        const { status = 500 } = refusal(error);
        if (status < 500 && status !== 429) this.#isSaccade = false;
      }
    }
    return this.#isSaccade ?? false;
  }

  async #defaultModel(signal: AbortSignal | undefined): Promise<string> {
    if (this.#model === undefined) {
      if (this.#isOpenAI) throw new SaccadeError("name a model: the server has many");
      const models = await this.openai.models.list(signal ? { signal } : {});
      this.#model = models.data[0]?.id;
    }
    if (this.#model === undefined) throw new SaccadeError("the server has no model");
    return this.#model;
  }

  async #hasFile(id: string): Promise<boolean> {
    try {
      await this.openai.files.retrieve(id);
      return true;
    } catch (error) {
      if (refusal(error).status === 404) return false;
      throw error;
    }
  }

  // -------------------------------------------------------------------- costs

  /** Undefined if the server does not tell: then the question itself gets its answer or error. */
  async #costsIfTold(
    pictures: readonly Asked[],
    budget: number | undefined,
    signal: AbortSignal | undefined,
  ): Promise<ImageCost[] | undefined> {
    try {
      return await this.#costs(pictures, budget, signal);
    } catch (error) {
      const { status } = refusal(error);
      if (status === undefined) throw error;
      this.#tellsCosts = ![403, 404, 405].includes(status);
      return undefined;
    }
  }

  async #costs(
    pictures: readonly Asked[],
    budget: number | undefined,
    signal: AbortSignal | undefined,
  ): Promise<ImageCost[]> {
    const found: ImageCost[] = [];
    const atATime = budget === undefined ? COSTS_AT_A_TIME : pictures.length;
    for (let start = 0; start < pictures.length; start += atATime) {
      const images = pictures
        .slice(start, start + atATime)
        .map(({ size: [width, height], detail = "auto", max_tokens }) => ({
          width,
          height,
          detail,
          max_tokens,
        }));
      found.push(...(await this.#postCosts({ images, max_image_tokens: budget }, signal)));
    }
    return found;
  }

  async #postCosts(
    body: Record<string, unknown>,
    signal: AbortSignal | undefined,
  ): Promise<ImageCost[]> {
    const answer = await this.openai.post<{ data?: ImageCost[] }>("/images/tokens", {
      body,
      ...(signal ? { signal } : {}),
    });
    if (!Array.isArray(answer.data)) throw new UnexpectedAnswer("the server tells no costs");
    return answer.data;
  }
}

type Sent<Data> = Promise<{ data: Data; response: Response; exchange: Exchange }>;

/** Without a key there is nothing to send, and nothing that a page would give away. */
function withDefaults(options: OpenAIOptions): OpenAIOptions {
  const { env = {} } = globalThis.process ?? {};
  const baseURL = options.baseURL ?? (env["OPENAI_BASE_URL"] || DEFAULT_URL);
  if (options.apiKey || env["OPENAI_API_KEY"]) return { ...options, baseURL };
  const given = (options.defaultHeaders ?? {}) as Headers | Record<string, string>;
  const headers = Symbol.iterator in given ? Object.fromEntries(given) : given;
  return {
    dangerouslyAllowBrowser: true,
    ...options,
    baseURL,
    apiKey: "none",
    defaultHeaders: { Authorization: null, ...headers },
  };
}

async function asked(
  question: string,
  sources: MediaSource | readonly MediaSource[],
): Promise<Message[]> {
  const found = await loaded(sources);
  return [{ role: "user", content: found.length > 0 ? [...found, question] : question } as Message];
}

function loaded(sources: MediaSource | readonly MediaSource[]): Promise<(Picture | Pdf | Video)[]> {
  return Promise.all((Array.isArray(sources) ? sources : [sources]).map(media));
}

/** The answer, with its pictures in the caller's pixels. It becomes part of the conversation. */
function answerOf(completion: Completion, response: Response, exchange: Exchange): Answer {
  if (!Array.isArray(completion.choices))
    throw new UnexpectedAnswer("the answer is no chat completion");
  const details: ShownImage[] | null | undefined = completion.image_details;
  const images = exchange.prepared.images(details ?? undefined);
  const grounding = inOriginals(completion.grounding ?? undefined, details ?? [], images);
  const answer = new Answer(completion, images, response.headers, grounding);
  const { conversation, messages } = exchange;
  if (conversation !== undefined) {
    const { tool_calls } = completion.choices[0]?.message ?? {};
    const calls = tool_calls?.length ? { tool_calls } : {};
    conversation.messages = [...messages, { role: "assistant", content: answer.text, ...calls }];
  }
  return answer;
}

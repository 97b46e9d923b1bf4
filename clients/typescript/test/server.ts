// The server under test, the pictures, and a client whose requests are recorded.
import { readFile } from "node:fs/promises";
import { join } from "node:path";

import OpenAI from "openai";
import { Client, type ClientOptions } from "saccade-client";

function given(name: string): string {
  const value = process.env[name];
  if (value === undefined) throw new Error(`${name} is not set: tests/server runs these tests`);
  return value;
}

export const SERVER = given("SACCADE_URL");
const PICTURES = given("SACCADE_PICTURES");
export const WHAT = "What is in the image?";

export const path = (name: string): string => join(PICTURES, name);
export const bytes = async (name: string): Promise<Buffer<ArrayBuffer>> =>
  Buffer.from(new Uint8Array(await readFile(path(name))).buffer);

export interface Sent {
  url: string;
  method: string;
  headers: Headers;
  body: string;
}

type Rewrite = (request: Sent) => Partial<Sent>;
const same: Rewrite = () => ({});

/** A client, and all requests that it sends. `rewrite` changes them on their way. */
export function recorded(options: ClientOptions = {}, rewrite = same): [Client, Sent[]] {
  const sent: Sent[] = [];
  const client = new Client({
    baseURL: `${SERVER}/v1`,
    ...options,
    fetch: async (input, init = {}) => {
      const url = String(input);
      const body = typeof init.body === "string" ? init.body : "";
      const request = {
        url,
        method: init.method ?? "GET",
        headers: new Headers(init.headers),
        body,
      };
      sent.push(request);
      const changed = rewrite(request);
      const newBody = changed.body === undefined ? {} : { body: changed.body };
      return fetch(changed.url ?? url, { ...init, ...newBody });
    },
  });
  return [client, sent];
}

export const bodies = (sent: readonly Sent[], path: string): string[] =>
  sent.filter(({ url }) => new URL(url).pathname === path).map(({ body }) => body);

export const CHAT = "/v1/chat/completions";
export const COSTS = "/v1/images/tokens";

export const plainOpenAI = (): OpenAI =>
  new OpenAI({ baseURL: `${SERVER}/v1`, apiKey: "none", maxRetries: 0 });

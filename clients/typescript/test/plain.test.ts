// The client against plain vLLM.
import assert from "node:assert/strict";
import { test } from "node:test";

import { NotFoundError } from "openai";

import { bytes, CHAT, path, recorded, WHAT } from "./server.ts";

test("plain vLLM answers, and gets pictures as they are", async () => {
  const [client, sent] = recorded();
  const given = [path("red.png"), path("photo.jpg")];
  const answer = await client.ask(WHAT, given, { temperature: 0, max_tokens: 8 });
  assert.deepEqual(
    answer.images.map(({ width, height }) => [width, height]),
    [
      [224, 224],
      [1600, 1200],
    ],
  );
  const stream = await client.stream(WHAT, path("red.png"), { temperature: 0 });
  let text = "";
  for await (const piece of stream) text += piece;
  assert.equal(text, "a red circle");
  assert.equal(stream.answer.text, text);
  await assert.rejects(client.ask("?", [], { model: "none" }), NotFoundError);
  const paths = new Set(sent.map(({ url }) => new URL(url).pathname));
  assert.deepEqual(paths, new Set(["/version", "/v1/models", CHAT]));
  const file = (await bytes("photo.jpg")).toString("base64");
  assert.ok(sent.find(({ url }) => url.endsWith(CHAT))!.body.includes(file));
});

// The client in Node against the real server.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";
import { pathToFileURL } from "node:url";

import { APIError, BadRequestError, NotFoundError } from "openai";
import {
  Client,
  Conversation,
  findBoxes,
  pdf,
  picture,
  SaccadeError,
  UnexpectedAnswer,
  UnusableMedia,
  video,
  type PictureOptions,
} from "saccade-client";

import { bodies, bytes, CHAT, COSTS, path, plainOpenAI, recorded, SERVER, WHAT } from "./server.ts";

const LARGE = [4000, 3000] as const;

const total = (sent: readonly { body: string }[]): number =>
  sent.reduce((sum, { body }) => sum + body.length, 0);

for (const options of [{}, { detail: "low" }, { max_tokens: 100 }] satisfies PictureOptions[])
  test(`a large photo takes a fifth of the bytes and the same tokens: ${JSON.stringify(options)}`, async () => {
    const [client, sent] = recorded();
    const [asItIs, all] = recorded({ resize: false });
    const photo = picture(path("large.jpg"), options);
    const small = await client.ask(WHAT, photo, { max_tokens: 8 });
    const large = await asItIs.ask(WHAT, photo, { max_tokens: 8 });
    assert.ok(5 * total(sent) <= total(all), `${total(sent)} of ${total(all)} bytes`);
    assert.ok(small.usage?.prompt_tokens_details?.image_tokens);
    assert.deepEqual(
      [small.usage.prompt_tokens_details.image_tokens, small.usage.prompt_tokens],
      [large.usage?.prompt_tokens_details?.image_tokens, large.usage?.prompt_tokens],
    );
    for (const { images } of [small, large])
      assert.deepEqual(
        images.map(({ width, height, region }) => ({ width, height, region })),
        [{ width: LARGE[0], height: LARGE[1], region: [0, 0, ...LARGE] }],
      );
  });

test("a budget gives the same tokens", async () => {
  const tokens = async (client: Client, given: string[]) => {
    const options = { max_tokens: 4, max_image_tokens: 150 };
    return (await client.ask(WHAT, given, options)).images.map((shown) => shown.tokens ?? 0);
  };
  for (const given of [
    [path("photo.jpg"), path("turned.jpg"), path("red.png")],
    [path("photo.jpg")],
  ]) {
    const [small, sent] = recorded();
    const [large, all] = recorded({ resize: false });
    const found = await tokens(small, given);
    assert.deepEqual(found, await tokens(large, given));
    assert.equal(found.length, given.length);
    assert.ok(found.reduce((a, b) => a + b) <= 150);
    // Pictures share a budget by their sizes, so several of them may have to keep theirs.
    if (given.length === 1) assert.ok(total(sent) * 3 < total(all));
  }
});

test("costs are asked once for each size, and are those of the answer", async () => {
  const [client, sent] = recorded();
  for (let n = 0; n < 3; n++) await client.ask(WHAT, path("photo.jpg"), { max_tokens: 1 });
  assert.equal(bodies(sent, COSTS).length, 2);
  assert.equal(bodies(sent, CHAT).length, 3);
  const pictures = [
    path("red.png"),
    picture(path("photo.jpg"), { max_tokens: 50 }),
    path("red.gif"),
  ];
  const costs = await client.costs(pictures);
  const { images } = await client.ask(WHAT, pictures);
  assert.deepEqual(
    costs.map(({ tokens }) => tokens),
    images.map(({ tokens }) => tokens),
  );
  assert.ok(costs.every(({ kv_bytes }) => kv_bytes > 0));
  const pages = await client.costs(path("pages.pdf"));
  assert.equal(pages.length, 2);
});

test("a picture that EXIF turns is sent upright", async () => {
  const [client, sent] = recorded();
  const { images } = await client.ask(WHAT, path("turned.jpg"), { max_tokens: 1 });
  assert.deepEqual([images[0]?.width, images[0]?.height], [1200, 1600]);
  const file = await bytes("turned.jpg");
  assert.ok(bodies(sent, CHAT)[0]!.length * 3 < file.length);
});

test("pictures come from anything", async () => {
  const client = recorded()[0];
  const data = await bytes("red.png");
  const sources = [
    path("red.png"),
    pathToFileURL(path("red.png")),
    data,
    new Uint8Array(data).buffer,
    new Blob([data]),
    new File([data], "red.png"),
    `data:image/png;base64,${data.toString("base64")}`,
    new URL(`data:image/png;base64,${data.toString("base64")}`),
    URL.createObjectURL(new Blob([data])),
  ];
  for (const source of sources) {
    const answer = await client.ask(WHAT, source, { temperature: 0 });
    assert.equal(answer.text, "a red circle");
  }
  await assert.rejects(client.ask(WHAT, "/no/such/file.png"), UnusableMedia);
});

test("a conversation sends a picture once, and its session", async () => {
  const [client, sent] = recorded();
  const conversation = new Conversation({ system: "Answer briefly." });
  const first = await client.ask(WHAT, path("once.png"), { conversation, temperature: 0 });
  assert.equal(first.text, "a red circle");
  const color = await client.ask("What color is the shape?", [], { conversation, temperature: 0 });
  assert.equal(color.text, "red");
  assert.deepEqual(
    bodies(sent, CHAT).map((body) => body.includes("base64")),
    [true, false],
  );
  assert.equal(color.images[0]?.cached, "embedding");
  assert.deepEqual(
    conversation.messages.map(({ role }) => role),
    ["system", "user", "assistant", "user", "assistant"],
  );
  // The Python client makes the same name of the same picture.
  const hash = createHash("sha256")
    .update(await bytes("once.png"))
    .digest("hex");
  const questions = sent.filter(({ url }) => url.endsWith(CHAT));
  for (const { headers } of questions) {
    assert.equal(headers.get("x-session-id"), hash.slice(0, 32));
    assert.equal(headers.get("x-smg-routing-key"), hash.slice(0, 32));
    assert.equal(headers.get("x-request-timeout"), "600");
    assert.equal(headers.get("authorization"), null);
  }
  assert.ok(bodies(sent, CHAT)[1]!.includes(`"uuid":"sha256-${hash}"`));
});

test("a request without pictures has no session, and the caller's wins", async () => {
  const found: unknown[] = [];
  for (const defaultHeaders of [{}, { "x-session-id": "mine" }, { "X-SMG-Routing-Key": "mine" }]) {
    const [client, sent] = recorded({ defaultHeaders });
    for (const pictures of [[], path("red.png")]) {
      await client.ask(WHAT, pictures, { max_tokens: 1 });
      const { headers } = sent.at(-1)!;
      found.push(["x-session-id", "x-smg-routing-key"].map((name) => headers.get(name)));
    }
  }
  const key = createHash("sha256").update(await bytes("red.png")).digest("hex").slice(0, 32);
  const mine = ["mine", "mine"];
  assert.deepEqual(found, [[null, null], [key, key], mine, mine, mine, mine]);
});

test("a picture that the server forgot is sent again", async () => {
  // The server gets the picture under another name, and never knows the one that the client has.
  const [client, sent] = recorded({}, ({ body, url }) =>
    url.endsWith(CHAT) && body.includes("base64") && bodies(sent, CHAT).length === 1
      ? { body: body.replace('"uuid":"sha256-', '"uuid":"other-') }
      : {},
  );
  for (let n = 0; n < 2; n++) {
    const answer = await client.ask(WHAT, path("forgotten.png"), { temperature: 0 });
    assert.equal(answer.text, "a blue circle");
  }
  assert.deepEqual(
    bodies(sent, CHAT).map((body) => body.includes("base64")),
    [true, false, true],
  );
});

test("an upload is sent once", async () => {
  const [client, sent] = recorded();
  const [first, again] = [
    await client.upload(path("red.png")),
    await client.upload(path("red.png")),
  ];
  assert.ok(first.file_id !== undefined && first.file_id === again.file_id);
  const uploads = sent.filter(({ url, method }) => url.endsWith("/files") && method === "POST");
  assert.equal(uploads.length, 1);
  assert.equal((await client.ask(WHAT, first, { temperature: 0 })).text, "a red circle");
  await client.delete(first.file_id);
  await assert.rejects(client.ask(WHAT, first), NotFoundError);
  const other = await client.upload(path("red.png"), { lifetime_s: 3600 });
  assert.notEqual(other.file_id, first.file_id);
  const document = await client.upload(pdf(path("pages.pdf"), { pages: "2" }));
  assert.equal((await client.ask(WHAT, document)).images.length, 1);
  for (const { file_id } of [other, document]) await client.delete(file_id!);
});

test("a stream ends with the whole answer", async () => {
  const client = recorded()[0];
  const stream = await client.stream(WHAT, path("photo.jpg"), { temperature: 0 });
  assert.throws(() => stream.answer, SaccadeError);
  const pieces: string[] = [];
  for await (const piece of stream) pieces.push(piece);
  const { answer } = stream;
  assert.equal(answer.text, pieces.join(""));
  assert.deepEqual([answer.images[0]?.width, answer.images[0]?.height], [1600, 1200]);
  assert.equal(answer.usage?.prompt_tokens_details?.image_tokens, answer.images[0]?.tokens);
  assert.equal(answer.finishReason, "stop");
});

test("a stream may be left early, or be cut off", async () => {
  const client = recorded()[0];
  const options = { extra_body: { min_tokens: 200 }, max_tokens: 200 };
  for await (const piece of await client.stream(WHAT, path("red.png"), options)) {
    assert.ok(piece);
    break;
  }
  const cut = new Client({
    baseURL: client.openai.baseURL,
    fetch: async (url, init) => {
      const response = await fetch(url, init);
      if (!String(url).endsWith(CHAT)) return response;
      const [event] = (await response.text()).split("\n\n", 1);
      return new Response(`${event}\n\n`, response);
    },
  });
  const stream = await cut.stream(WHAT, path("red.png"));
  await assert.rejects(async () => {
    for await (const piece of stream) assert.ok(piece);
  }, UnexpectedAnswer);
});

test("tools are called in a conversation, and in streams of the openai package", async () => {
  const client = recorded()[0];
  const color = { type: "string", enum: ["red", "green"] };
  const properties = { properties: { color }, required: ["color"], additionalProperties: false };
  const parameters = { type: "object", ...properties };
  const tell = { name: "tell", strict: true, parameters };
  const tools = [{ type: "function" as const, function: tell }];
  const call = { tools, tool_choice: { type: "function" as const, function: { name: "tell" } } };
  const conversation = new Conversation();
  const options = { ...call, conversation, temperature: 0, max_tokens: 100 };
  const { completion } = await client.ask(WHAT, path("red.png"), options);
  const [called] = completion.choices[0]!.message.tool_calls!;
  assert.ok(called?.type === "function");
  assert.deepEqual(JSON.parse(called.function.arguments), { color: "red" });
  const said = conversation.messages.at(-1)!;
  assert.deepEqual("tool_calls" in said && said.tool_calls, [called]);
  const result = { role: "tool" as const, tool_call_id: called.id, content: "It is." };
  await client.chat([result], { conversation, max_tokens: 1 });
  assert.deepEqual(
    conversation.messages.map(({ role }) => role),
    ["user", "assistant", "tool", "assistant"],
  );
  const content = [picture(path("red.png")), WHAT];
  const messages = await client.messages([{ role: "user", content }]);
  const fields = { ...call, model: "saccade-tiny", messages, temperature: 0 };
  const stream = client.openai.chat.completions.stream(fields);
  const { choices } = await stream.finalChatCompletion();
  const [streamed] = choices[0]!.message.tool_calls!;
  assert.ok(streamed?.type === "function");
  assert.deepEqual(streamed.function.arguments, called.function.arguments);
});

test("a server that is busy may still be Saccade", async () => {
  const busy = [503, 429];
  const client = new Client({
    baseURL: `${SERVER}/v1`,
    maxRetries: 0,
    fetch: async (url, init) => {
      const status = String(url).endsWith("/version") ? busy.pop() : undefined;
      return status === undefined ? fetch(url, init) : new Response("busy", { status });
    },
  });
  for (const isTold of [false, false, true]) {
    const { images } = await client.ask(WHAT, path("red.png"), { max_tokens: 1 });
    assert.equal(images[0]!.tokens !== undefined, isTold);
  }
});

test("boxes are in pixels of the original", async () => {
  const client = recorded()[0];
  const question = "Give the bounding box of the red circle.";
  const answer = await client.ask(question, path("box.jpg"), { temperature: 0 });
  const [inThousandths] = findBoxes(answer.text);
  const [box] = answer.boxes();
  assert.ok(inThousandths && box && answer.images[0]);
  const { width, height } = answer.images[0];
  assert.deepEqual([width, height], [3200, 2400]);
  assert.equal(Math.round(box.left), Math.round((inThousandths.left * width) / 1000));
  assert.equal(Math.round(box.bottom), Math.round((inThousandths.bottom * height) / 1000));
  assert.throws(() => answer.boxes(1000, 1), RangeError);
});

test("documents and videos are understood", async () => {
  const client = recorded()[0];
  const pages = pdf(path("pages.pdf"), { pages: "2" });
  const { images } = await client.ask(WHAT, [pages, path("photo.jpg")]);
  assert.equal(images.length, 2);
  assert.equal(images[1]?.width, 1600);
  for (const clip of [
    path("clip.mp4"),
    video(await bytes("clip.mp4"), { mediaType: "video/mp4" }),
  ])
    assert.equal(
      (await client.ask("In which direction does the circle move?", clip, { temperature: 0 })).text,
      "right",
    );
});

test("an error names the part", async () => {
  const client = recorded()[0];
  const broken = (await bytes("red.png")).subarray(0, 100);
  await assert.rejects(client.ask(WHAT, [path("red.png"), broken]), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.code, "invalid_image");
    assert.equal(error.param, "messages[0].content[1].image_url");
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(client.ask(WHAT, path("red.png"), { model: "none" }), NotFoundError);
  const signal = AbortSignal.abort();
  await assert.rejects(client.ask(WHAT, path("red.png"), { signal }), APIError);
});

test("messages for other clients are plain JSON", async () => {
  const client = recorded()[0];
  const messages = await client.messages([
    { role: "user", content: [picture(path("photo.jpg")), WHAT] },
  ]);
  const model = "saccade-tiny";
  const answer = await plainOpenAI().chat.completions.create({ model, messages, temperature: 0 });
  const ours = await client.ask(WHAT, path("photo.jpg"), { temperature: 0 });
  assert.equal(answer.usage?.prompt_tokens, ours.usage?.prompt_tokens);
});

test("headers are added to every request", async () => {
  for (const defaultHeaders of [{ "X-Team": "a" }, new Headers({ "X-Team": "a" })]) {
    const [client, sent] = recorded({ defaultHeaders });
    await client.ask(WHAT, path("red.png"), { max_tokens: 1 });
    assert.ok(sent.length > 2);
    for (const { headers } of sent)
      assert.deepEqual([headers.get("x-team"), headers.get("authorization")], ["a", null]);
  }
});

test("a server that tells no costs gets pictures as they are", async () => {
  const [client, sent] = recorded({}, ({ url }) => ({ url: url.replace(COSTS, "/v1/none") }));
  for (let n = 0; n < 2; n++) {
    const answer = await client.ask(WHAT, path("photo.jpg"), { max_tokens: 1 });
    assert.equal(answer.images[0]?.width, 1600);
  }
  const file = (await bytes("photo.jpg")).toString("base64");
  assert.ok(bodies(sent, CHAT)[0]!.includes(file));
  assert.equal(bodies(sent, COSTS).length, 1);
});

test("OpenAI is asked nothing but the question", async () => {
  const host = "https://api.openai.com";
  const { origin } = new URL(recorded()[0].openai.baseURL);
  const options = { baseURL: `${host}/v1`, apiKey: "none" };
  const [client, sent] = recorded(options, ({ url }) => ({ url: url.replace(host, origin) }));
  const photo = picture(path("photo.jpg"), { detail: "low", max_tokens: 9 });
  await assert.rejects(client.ask(WHAT, photo), SaccadeError); // it has many models
  const answer = await client.ask(WHAT, photo, { model: "saccade-tiny", max_tokens: 1 });
  assert.equal(answer.images[0]?.width, 1600);
  assert.deepEqual(
    sent.map(({ url }) => url),
    [host + CHAT],
  );
  assert.deepEqual(
    [...sent[0]!.headers.keys()].filter(
      (name) => name.startsWith("x-") && !name.startsWith("x-stainless"),
    ),
    [],
  );
  const part = JSON.parse(sent[0]!.body).messages[0].content[0];
  assert.deepEqual(Object.keys(part), ["type", "image_url"]);
  assert.deepEqual(Object.keys(part.image_url).sort(), ["detail", "url"]);
  await assert.rejects(
    client.ask(WHAT, pdf(path("pages.pdf"), { pages: "1" }), { model: "saccade-tiny" }),
    UnusableMedia,
  );
});

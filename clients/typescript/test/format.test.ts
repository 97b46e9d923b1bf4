// What the first bytes of a picture tell, sessions and boxes: without a server.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

import {
  findBoxes,
  findPoints,
  pointToOriginal,
  toOriginal,
  type Message,
  type ShownImage,
} from "saccade-client";
import sharp from "sharp";

import { formatOf } from "../dist/format.js";
import { findPlaces, type Place } from "../dist/grounding.js";
import { prepare } from "../dist/prepare.js";

const SIZE = { width: 30, height: 20 };
const drawn = (channels: 3 | 4 = 3) => sharp({ create: { ...SIZE, channels, background: "red" } });
const formatFrom = async (image: ReturnType<typeof sharp>) =>
  formatOf(new Uint8Array(await image.toBuffer()));

const plain = (mediaType: string, isLossy: boolean) => ({
  mediaType,
  size: [30, 20],
  isPlain: true,
  isLossy,
});

test("pictures that can be resized", async () => {
  assert.deepEqual(await formatFrom(drawn().jpeg()), plain("image/jpeg", true));
  assert.deepEqual(
    await formatFrom(drawn().jpeg({ progressive: true })),
    plain("image/jpeg", true),
  );
  assert.deepEqual(await formatFrom(drawn().greyscale().jpeg()), plain("image/jpeg", true));
  assert.deepEqual(await formatFrom(drawn(4).png()), plain("image/png", false));
  assert.deepEqual(await formatFrom(drawn().webp()), plain("image/webp", true));
  assert.deepEqual(await formatFrom(drawn(4).webp({ lossless: true })), {
    ...plain("image/webp", false),
  });
  assert.deepEqual(await formatFrom(drawn().avif()), plain("image/avif", true));
  const turned = await formatFrom(drawn().withMetadata({ orientation: 6 }).jpeg());
  assert.deepEqual(turned.size, [20, 30]);
});

test("pictures that are sent as they are", async () => {
  const isPlain = async (image: ReturnType<typeof sharp>) => (await formatFrom(image)).isPlain;
  assert.equal(await isPlain(drawn().toColourspace("cmyk").jpeg()), false);
  assert.equal(await isPlain(drawn().toColourspace("rgb16").png()), false);
  assert.equal(await isPlain(drawn().gif()), false);
  assert.equal(await isPlain(drawn().tiff()), false);
  const pages = await sharp(
    [await drawn().png().toBuffer(), await drawn().negate().png().toBuffer()],
    {
      join: { animated: true },
    },
  )
    .webp()
    .toBuffer();
  assert.deepEqual(formatOf(new Uint8Array(pages)).isPlain, false);
  const png = new Uint8Array(await drawn().png().toBuffer());
  const control = [0, 0, 0, 8, ...Buffer.from("acTL"), ...new Array<number>(12).fill(0)];
  const animated = new Uint8Array([...png.subarray(0, 33), ...control, ...png.subarray(33)]);
  assert.equal(formatOf(animated).isPlain, false);
  const unknown = { mediaType: "application/octet-stream", isPlain: false, isLossy: false };
  assert.deepEqual(formatOf(new Uint8Array([1, 2, 3])), unknown);
  for (const file of [png, new Uint8Array(await drawn().jpeg().toBuffer())])
    for (let length = 0; length < 60; length++)
      assert.equal(formatOf(file.slice(0, length)).isPlain, false);
});

test("boxes are found in the notations of models", () => {
  const box = { left: 1, top: 2, right: 3, bottom: 4 };
  assert.deepEqual(findBoxes("at [1, 2, 3, 4]"), [box]);
  assert.deepEqual(findBoxes("It is at (1,2),(3,4)."), [box]);
  assert.deepEqual(
    findBoxes('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [1, 2, 3, 4]}]'),
    [{ ...box, label: "a" }, box],
  );
  assert.deepEqual(findBoxes("[1, 2, 3] and 4"), []);
});

test("places are found in each notation, as by the other client", async () => {
  const file = new URL("../../grounding.json", import.meta.url);
  const examples = JSON.parse(await readFile(file, "utf8")) as {
    what: string;
    text: string;
    places: Place[];
  }[];
  assert.ok(examples.length > 10);
  for (const { what, text, places } of examples) {
    assert.deepEqual(findPlaces(text), places, what);
    assert.deepEqual(findPlaces(`${text}\nThen\n${text}`), [...places, ...places], what);
  }
});

test("a point is mapped to the original, in the range that its notation tells", () => {
  const shown: ShownImage = { width: 500, height: 300, region: [100, 0, 300, 300] };
  const [point] = findPoints('<point x="50" y="10" alt="x">x</point>');
  assert.deepEqual(pointToOriginal(point!, shown), { x: 200, y: 30, label: "x" });
});

test("a box is mapped to the original by what was shown", () => {
  const box = { left: 0, top: 0, right: 1000, bottom: 500, label: "a" };
  const padded = { width: 500, height: 300, region: [-50, 0, 550, 300] } as const;
  assert.deepEqual(toOriginal(box, { ...padded, region: [...padded.region] }), {
    ...{ left: -50, top: 0, right: 550, bottom: 150, label: "a" },
  });
  const shrunk = { ...{ width: 50, height: 50 }, processed_width: 200, processed_height: 100 };
  const inPixels = { left: 100, top: 0, right: 200, bottom: 10 };
  assert.deepEqual(toOriginal(inPixels, { ...shrunk, region: [0, 0, 50, 50] }, null), {
    ...{ left: 25, top: 0, right: 50, bottom: 5 },
  });
});

test("conversations have the sessions that both clients give them", async () => {
  const file = new URL("../../session_keys.json", import.meta.url);
  const examples = JSON.parse(await readFile(file, "utf8")) as {
    what: string;
    messages: Message[];
    key: string | null;
  }[];
  assert.ok(examples.length > 5);
  const [targets, budget, signal] = [undefined, undefined, undefined];
  for (const { what, messages, key } of examples) {
    const options = { isSaccade: true, quality: 90, targets, budget, signal };
    assert.equal((await prepare(messages, options)).session ?? null, key, what);
  }
});

// Print an answer about a picture while it is generated, with Anthropic's package for Node.
//
//     npm install @anthropic-ai/sdk
//     node with_anthropic.mjs [FILE]
//
// It uses the server at ANTHROPIC_BASE_URL, by default http://127.0.0.1:8000.
import Anthropic from "@anthropic-ai/sdk";
import { readFile } from "node:fs/promises";

const file = process.argv[2] ?? new URL("red_circle.png", import.meta.url);
const picture = await readFile(file, "base64");

const client = new Anthropic({
  baseURL: process.env.ANTHROPIC_BASE_URL ?? "http://127.0.0.1:8000",
  apiKey: process.env.ANTHROPIC_API_KEY ?? "none",
});
const stream = client.messages
  .stream({
    model: "saccade-tiny",
    max_tokens: 64,
    messages: [
      {
        role: "user",
        content: [
          { type: "image", source: { type: "base64", media_type: "image/png", data: picture } },
          { type: "text", text: "What is in the image?" },
        ],
      },
    ],
    temperature: 0,
  })
  .on("text", (text) => process.stdout.write(text));
const { usage } = await stream.finalMessage();
console.log(`\n${usage.input_tokens} + ${usage.output_tokens} tokens`);

// Print an answer about a picture while it is generated, with OpenAI's package for Node.
//
//     npm install openai
//     node with_openai.mjs [FILE]
//
// It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
import { readFile } from "node:fs/promises";
import OpenAI from "openai";

const file = process.argv[2] ?? new URL("red_circle.png", import.meta.url);
const picture = await readFile(file, "base64");

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const stream = await client.chat.completions.create({
  model: "saccade-tiny",
  messages: [
    {
      role: "user",
      content: [
        { type: "image_url", image_url: { url: `data:image/png;base64,${picture}` } },
        { type: "text", text: "What is in the image?" },
      ],
    },
  ],
  temperature: 0,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  if (chunk.usage)
    console.log(`\n${chunk.usage.prompt_tokens} + ${chunk.usage.completion_tokens} tokens`);
}

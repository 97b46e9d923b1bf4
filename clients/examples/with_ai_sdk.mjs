// Print an answer about a picture while it is generated, with Vercel's AI SDK.
//
//     npm install ai @ai-sdk/openai-compatible
//     node with_ai_sdk.mjs [FILE]
//
// It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";
import { readFile } from "node:fs/promises";

const file = process.argv[2] ?? new URL("red_circle.png", import.meta.url);

const saccade = createOpenAICompatible({
  name: "saccade",
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.OPENAI_API_KEY,
  includeUsage: true,
});
const { textStream, usage } = streamText({
  model: saccade("saccade-tiny"),
  messages: [
    {
      role: "user",
      content: [
        { type: "file", mediaType: "image/png", data: await readFile(file) },
        { type: "text", text: "What is in the image?" },
      ],
    },
  ],
  temperature: 0,
});
for await (const text of textStream) process.stdout.write(text);
const { inputTokens, outputTokens } = await usage;
console.log(`\n${inputTokens} + ${outputTokens} tokens`);

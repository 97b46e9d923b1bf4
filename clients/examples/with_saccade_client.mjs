// Ask about a picture, then about boxes in it, with our own client: it resizes pictures to what the
// model sees, sends each once, and maps boxes back to your pixels.
//
//     npm ci --prefix clients      # in a checkout; docs/typescript.md says how to use it elsewhere
//     node clients/examples/with_saccade_client.mjs [FILE]
//
// It uses the server at OPENAI_BASE_URL, by default http://127.0.0.1:8000/v1.
import { Client, Conversation } from "saccade-client";

const file = process.argv[2] ?? new URL("red_circle.png", import.meta.url);

const client = new Client();
const conversation = new Conversation();
const options = { conversation, temperature: 0 };

const stream = await client.stream("What is in the image?", file, options);
for await (const text of stream) process.stdout.write(text);
const { usage, images } = stream.answer;
console.log(`\n${usage.prompt_tokens_details.image_tokens} tokens of the picture`);
console.log(`${images[0].width} x ${images[0].height} pixels`);

const answer = await client.ask("Give the bounding box of the red circle.", [], options);
for (const box of answer.boxes()) {
  const corners = [box.left, box.top, box.right, box.bottom].map(Math.round);
  console.log(`the circle is at ${corners.join(", ")}`);
}

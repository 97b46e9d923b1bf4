// A request as code that can be pasted: curl, Python, JavaScript.
import { key, urlOf } from "./api.js";
import { partWith } from "./attachments.js";

const MARK = (index) => `@@file${index}@@`;
const MIME = { image: "image/png", pdf: "application/pdf", video: "video/mp4", audio: "audio/wav" };
const OURS = ["include_image_details", "max_image_tokens"];
const quoted = (name) => `'${name.replaceAll("'", "'\\''")}'`;

/** The last question of a conversation as a request, with marks in the place of its files. */
function sample({ model, attachments, text, choices, maxTokens }) {
  const files = attachments.map((each, index) => ({
    name: each.name,
    mime: each.blob.type || MIME[each.kind],
    mark: MARK(index),
  }));
  const parts = attachments.map((each, index) => partWith(each, choices, MARK(index)));
  const body = {
    model,
    messages: [{ role: "user", content: [...parts, { type: "text", text }] }],
    include_image_details: true,
  };
  if (choices.budget) body.max_image_tokens = choices.budget;
  if (maxTokens) body.max_tokens = maxTokens;
  return { files, body };
}

function curl(question) {
  const { files, body } = sample(question);
  let json = JSON.stringify(body, null, 2).replace(/[\\$`]/g, "\\$&");
  for (const { name, mime, mark } of files)
    json = json.replace(mark, () => `data:${mime};base64,$(base64 -w0 ${quoted(name)})`);
  const auth = key.get() ? ' \\\n  -H "Authorization: Bearer $SACCADE_API_KEY"' : "";
  return `curl -s ${urlOf("v1/chat/completions")} -H 'Content-Type: application/json'${auth} -d @- <<END\n${json}\nEND\n`;
}

/** JSON as a Python literal. */
function literal(value, indent = "") {
  const deeper = indent + "    ";
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value))
    return `[\n${value.map((each) => deeper + literal(each, deeper)).join(",\n")},\n${indent}]`;
  if (typeof value === "object") {
    const items = Object.entries(value).map(
      ([name, each]) => `${JSON.stringify(name)}: ${literal(each, deeper)}`,
    );
    const line = `{${items.join(", ")}}`;
    return line.length < 80 && !line.includes("\n")
      ? line
      : `{\n${items.map((each) => deeper + each).join(",\n")},\n${indent}}`;
  }
  return JSON.stringify(value);
}

/** `value` without our own fields, and these. */
function split(body) {
  const given = Object.entries(body);
  return [
    given.filter(([name]) => !OURS.includes(name)),
    Object.fromEntries(given.filter(([name]) => OURS.includes(name))),
  ];
}

function python(question) {
  const { files, body } = sample(question);
  const [fields, extra] = split(body);
  let args = fields.map(([name, value]) => `    ${name}=${literal(value, "    ")},\n`).join("");
  for (const { name, mime, mark } of files)
    args = args.replace(
      `"${mark}"`,
      () => `data_url(${JSON.stringify(name)}, ${JSON.stringify(mime)})`,
    );
  return `import base64
${key.get() ? "import os\n" : ""}from pathlib import Path

from openai import OpenAI


def data_url(path: str, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


client = OpenAI(base_url=${JSON.stringify(urlOf("v1"))}, api_key=${key.get() ? 'os.environ["SACCADE_API_KEY"]' : '"none"'})
answer = client.chat.completions.create(
${args}    extra_body=${literal(extra, "    ")},
)
print(answer.choices[0].message.content)
`;
}

function javascript(question) {
  const { files, body } = sample(question);
  let json = JSON.stringify(body, null, 2);
  for (const { name, mime, mark } of files)
    json = json.replace(
      `"${mark}"`,
      () => `await dataUrl(${JSON.stringify(name)}, ${JSON.stringify(mime)})`,
    );
  return `import { readFile } from "node:fs/promises";
import OpenAI from "openai";

const dataUrl = async (path, mime) => \`data:\${mime};base64,\${await readFile(path, "base64")}\`;

const client = new OpenAI({ baseURL: ${JSON.stringify(urlOf("v1"))}, apiKey: ${key.get() ? "process.env.SACCADE_API_KEY" : '"none"'} });
const answer = await client.chat.completions.create(${json});
console.log(answer.choices[0].message.content);
`;
}

export const LANGUAGES = { curl, Python: python, JavaScript: javascript };

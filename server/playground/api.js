// The server's API: requests with the key of this tab, errors as the server words them, and streams.

const KEY = "saccade.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The URL of a route, below the page's own path. */
export const urlOf = (path) => new URL(path, document.baseURI.split("#")[0]).href;

/** An error of the server, or of the way to it (status 0). */
export class ApiError extends Error {
  constructor(status, { message, code, param }, { retryAfter, requestId } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter, requestId });
  }
}

async function errorOf(response) {
  let found = {};
  try {
    found = (await response.json()).error ?? {};
  } catch {
    // a proxy that answers with something else
  }
  return new ApiError(
    response.status,
    {
      message: found.message || `The server answered with status ${response.status}.`,
      code: found.code,
      param: found.param,
    },
    {
      retryAfter: Number(response.headers.get("retry-after")) || undefined,
      requestId: response.headers.get("x-request-id"),
    },
  );
}

async function send(path, body, signal) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(urlOf(path), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server cannot be reached.", code: "unreachable" });
  }
  if (!response.ok) {
    const error = await errorOf(response);
    if (error.status === 401) window.dispatchEvent(new CustomEvent("needs-key"));
    throw error;
  }
  return response;
}

export const getJson = async (path, signal) => (await send(path, undefined, signal)).json();
export const getText = async (path, signal) => (await send(path, undefined, signal)).text();
export const postJson = async (path, body, signal) => (await send(path, body, signal)).json();

/** The stages of a request by name, in milliseconds, of the value of `Server-Timing`. */
export function timingOf(value) {
  const stages = {};
  for (const [, name, ms] of value.matchAll(/([a-z_]+);dur=([0-9.]+)/g)) stages[name] = Number(ms);
  return stages;
}

/** Throws the error of a stream that ends too early; `error` is the browser's. */
function lost(error) {
  if (error?.name === "AbortError") throw error;
  throw new ApiError(0, {
    message: "The connection to the server was lost before the answer was complete.",
    code: "unreachable",
  });
}

/** Events of a streamed chat completion: `{chunk}` and, at its end, `{timing}`. */
export async function* streamChat(body, signal) {
  const response = await send("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, isComplete] = ["", false];
  for (;;) {
    const { done, value } = await reader.read().catch(lost);
    if (done && !isComplete) throw lost();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(": server-timing ")) yield { timing: timingOf(line) };
      isComplete ||= line === "data: [DONE]";
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new ApiError(500, chunk.error);
      yield { chunk };
    }
  }
}

const HINTS = {
  image_token_cap: "Raise the cap, or choose another detail.",
  image_too_large: "Make the picture smaller and try again.",
  image_url_blocked:
    "The server may not fetch this address. Save the picture and drop the file here.",
  invalid_api_key: "Enter a key that this server knows.",
  invalid_image: "The file may be damaged. Try to save it again in another program.",
  rate_limit_exceeded: "This key has used up its share for now.",
  server_busy: "Others are asking, too. Try again in a moment.",
  unreachable: "Check that it is still running, and try again.",
  unsupported_image_format: "Use JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC or AVIF.",
};

/** What a person can do about an error; "" if nothing is known. */
export const hintOf = (error) =>
  HINTS[error.code] ?? (error.status === 503 ? HINTS.server_busy : "");

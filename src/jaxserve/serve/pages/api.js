// The server's routes, relative to the page, which may lie below any path.
import { tabStore } from "./tools.js";

const url = (path) => new URL(path, document.baseURI);

/** A refusal or failure, with a message for the user. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => tabStore.read("key", ""),
  set: (value) => tabStore.write("key", value),
};

function headers() {
  const given = key.get();
  return given ? { Authorization: `Bearer ${given}` } : {};
}

async function refusal(response) {
  let message;
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answered ${response.status}.`;
  }
  return new ApiError(message, response.status);
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(url(path), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** What the live view draws. */
export async function live(signal) {
  return (await send("pages/live", { signal })).json();
}

/** The models that are served. */
export async function models() {
  return (await (await send("v1/models", { headers: headers() })).json()).data;
}

/**
 * Send a conversation and yield the chunks of the answer as they come.
 * @param {object} body of POST /v1/chat/completions, without what makes it a stream
 * @param {AbortSignal} signal closes the connection, whereupon the server drops the request
 */
export async function* chat(body, signal) {
  const stream = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify({ ...body, ...stream }),
    signal,
  });
  let isComplete = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      isComplete = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.code);
    yield chunk;
  }
  if (!isComplete) throw new ApiError("The connection was lost before the answer was complete.", 0);
}

/** Yield the data of server-sent events, however their bytes were cut into pieces. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const frames = (rest + value).split(/\r?\n\r?\n/);
      rest = frames.pop();
      for (const frame of frames) {
        const lines = frame.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

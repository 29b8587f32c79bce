const BROKEN = "The connection broke before the result arrived.";

/** An error that the gateway reports. `param` names the request parameter at fault, or is null. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = status === 401 ? "api_key" : param;
  }
}

/** Return the served models, each with its `id` and what `describe` says about it. */
export async function listModels(key) {
  const response = await call("v1/models", key);
  return (await response.json()).data;
}

/**
 * Send a request and call `onProgress` with each event of the stream until the last.
 *
 * Returns an event for each picture: `b64_json`, `output_format`, `size`, and the `seeds`, `timings`, and `warnings` of
 * the whole request.
 */
export async function generate(body, { key, signal, onProgress }) {
  const response = await call("v1/images/generations", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const pictures = [];
  try {
    for await (const event of events(response.body)) {
      if (event.error) throw new ApiError(event.error.message, { param: event.error.param });
      if (event.type === "image_generation.completed") pictures.push(event);
      else onProgress(event);
    }
  } catch (error) {
    throw error instanceof TypeError ? new ApiError(BROKEN) : error; // browsers' error for a broken connection
  }
  if (!pictures.length) throw new ApiError(BROKEN);
  return pictures;
}

async function call(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The gateway cannot be reached.");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The gateway answered ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  const advice = wait && !message.includes("retry") ? ` Try again in ${wait} s.` : "";
  throw new ApiError(message + advice, { status: response.status, param: error?.param });
}

/** Yield the data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader(); // Safari cannot iterate over a stream
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      yield JSON.parse(data.slice("data: ".length));
    }
  }
}

/** Decode base64 into a file. */
export function toFile(base64, name, type) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new File([bytes], name, { type });
}

/** Return a copy of a request in which every file is a data URI. */
export async function withDataUris(value) {
  if (value instanceof File) return dataUri(value);
  if (Array.isArray(value)) return Promise.all(value.map(withDataUris));
  if (value === null || typeof value !== "object") return value;
  const entries = Object.entries(value).map(async ([name, entry]) => [name, await withDataUris(entry)]);
  return Object.fromEntries(await Promise.all(entries));
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ApiError(`${file.name} cannot be read any more. Add it again.`));
    reader.readAsDataURL(file);
  });
}

// Requests to the server: the key, errors, and streams of events.

import { $, askText } from "./dom.js";

const KEY = "llm-edge.key";
const SILENCE = 45_000; // milliseconds without a byte, after which a stream is taken for lost
let asking = null;
let memoryKey = "";

export class ServerError extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function key() {
  try {
    return sessionStorage.getItem(KEY) ?? memoryKey;
  } catch {
    return memoryKey;
  }
}

function headers() {
  return key() ? { Authorization: `Bearer ${key()}` } : {};
}

// Asks for the key, once for all requests that need it.
function askKey(wrong) {
  asking ??= askText("API key needed", "Key of this server", "", {
    action: "Continue",
    type: "password",
    hint: wrong
      ? "This key is not valid. It is set with --api-key or --api-key-file where the server was started."
      : "This server was started with --api-key or --api-key-file. The key is kept until this tab is closed.",
  }).then((given) => {
    asking = null;
    memoryKey = (given ?? "").trim();
    try {
      sessionStorage.setItem(KEY, memoryKey);
    } catch {
      // kept in memory
    }
    return given !== null;
  });
  return asking;
}

export function connected(yes) {
  const banner = $("banner");
  if (yes) {
    banner.hidden = true;
  } else if (banner.hidden) {
    banner.textContent = "The server does not answer. Trying again… Nothing you wrote is lost.";
    banner.hidden = false;
  }
}

// The address of a path of the page's API; paths of the server's other APIs are given whole.
const address = (path) => (path.startsWith("/models/jobs") ? path : `/ui/api${path}`);

async function send(path, options) {
  const used = key();
  let response;
  try {
    response = await fetch(address(path), { ...options, headers: { ...options.headers, ...headers() } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connected(false);
    throw new ServerError("The server does not answer. Check that llm-serve is running, then try again.");
  }
  connected(true);
  if (response.status === 401) {
    const agreed = used !== key() || (await askKey(Boolean(used)));
    if (!agreed) throw new ServerError("A key is needed. Reload the page to enter it.", 401);
    return send(path, options);
  }
  return response;
}

async function failure(response) {
  let detail = "";
  let code = "";
  try {
    const body = await response.json();
    detail = body.detail ?? body.error?.message;
    code = body.code ?? body.error?.code;
  } catch {
    // not JSON
  }
  return new ServerError(typeof detail === "string" && detail ? detail : `The server answered ${response.status}.`, response.status, code);
}

export async function api(path, { method = "GET", body, raw } = {}) {
  const options = { method, headers: {} };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  } else if (raw !== undefined) {
    options.body = raw;
  }
  const response = await send(path, options);
  if (!response.ok) throw await failure(response);
  return response.json();
}

// Sends a form and reports the fraction that has been sent: fetch cannot.
export function upload(path, form, progress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address(path));
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => progress(event.lengthComputable ? event.loaded / event.total : null));
    request.addEventListener("error", () => reject(new ServerError("The upload was interrupted. Check that llm-serve is running, then try again.")));
    request.addEventListener("abort", () => reject(new ServerError("The upload was cancelled.")));
    request.addEventListener("load", () => {
      let body = {};
      try {
        body = JSON.parse(request.responseText);
      } catch {
        // not JSON
      }
      if (request.status < 300) resolve(body);
      else reject(new ServerError(body.detail ?? body.error?.message ?? `The server answered ${request.status}.`, request.status));
    });
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

// Saves a response as a file: a link could not carry the key.
export async function download(path) {
  const response = await send(path, { headers: {} });
  if (!response.ok) throw await failure(response);
  const name = /filename="([^"]+)"/.exec(response.headers.get("Content-Disposition") ?? "")?.[1] ?? "conversation";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Reads a stream of events until `signal` aborts, and connects again when it breaks; the server then sends the whole
// state, so nothing is missed.
export async function follow(path, handle, signal, ended = () => false) {
  let pause = 300;
  while (!signal.aborted) {
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    signal.addEventListener("abort", abort, { once: true });
    try {
      const response = await send(path, { headers: {}, signal: attempt.signal });
      if (!response.ok) throw await failure(response);
      await readEvents(response.body.getReader(), (name, data) => {
        pause = 300;
        handle(name, data);
      }, attempt);
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ServerError && error.status >= 400 && error.status < 500) {
        handle("gone", { detail: error.message });
        return;
      }
    } finally {
      signal.removeEventListener("abort", abort);
    }
    if (signal.aborted || ended()) return;
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(pause * 1.7, 4000);
  }
}

async function readEvents(reader, handle, attempt) {
  const decoder = new TextDecoder();
  let buffer = "";
  for (;;) {
    const silent = setTimeout(() => attempt.abort(), SILENCE);
    const { value, done } = await reader.read().finally(() => clearTimeout(silent));
    if (done) return;
    buffer += decoder.decode(value, { stream: true });
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const name = /^event: (.*)$/m.exec(event)?.[1];
      const data = /^data: (.*)$/m.exec(event)?.[1];
      if (data) handle(name ?? "message", JSON.parse(data));
    }
  }
}

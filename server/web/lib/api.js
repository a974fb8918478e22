/** The HTTP API: requests with the session's key, problems as errors, streams of events. */
import { Problem } from "./problem.js";
import { asksForKey, key } from "./session.js";

export { Problem };

/** The API's URL: the page is at web/DIGEST/ below it. */
const ROOT = new URL("../../../", import.meta.url);

/**
 * @typedef {{json?: unknown, headers?: Record<string, string>, signal?: AbortSignal}} Options
 */

/** @param {Record<string, string>} [more] */
function headersOf(more = {}) {
  return key.value ? { ...more, Authorization: `Bearer ${key.value}` } : more;
}

/** @param {number} status @param {string} text @param {string | null} retryAfter */
function problemOf(status, text, retryAfter) {
  if (status === 401) asksForKey.set("needed");
  const seconds = /^\d+$/.test(retryAfter ?? "") ? Number(retryAfter) : null; // proxies may send a date
  try {
    const found = JSON.parse(text);
    return new Problem(status, found.detail ?? found.title, found.errors ?? [], seconds);
  } catch {
    return new Problem(status, `the server answered ${status}, and nothing that can be read`, [], seconds);
  }
}

const UNREACHABLE = "the server can't be reached: is it still running?";

/**
 * Send a request. Throws a Problem unless it succeeds or nothing has changed (304); aborts are thrown unchanged.
 * @param {string} method
 * @param {string} path
 * @param {Options} [options]
 */
export async function call(method, path, { json, headers = {}, signal } = {}) {
  /** @type {RequestInit} */
  const init = { method, headers: headersOf(headers), cache: "no-store" };
  if (signal) init.signal = signal;
  if (json !== undefined) {
    init.body = JSON.stringify(json);
    init.headers = { ...init.headers, "Content-Type": "application/json" };
  }
  let response;
  try {
    response = await fetch(linkTo(path), init);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(0, UNREACHABLE);
  }
  if (response.ok || response.status === 304) return response;
  throw problemOf(response.status, await response.text(), response.headers.get("retry-after"));
}

/**
 * The answer's JSON; null if it is empty.
 * @param {string} method
 * @param {string} path
 * @param {Options} [options]
 * @returns {Promise<any>}
 */
export async function ask(method, path, options) {
  const response = await call(method, path, options);
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** @param {string} path @param {AbortSignal} [signal] @returns {Promise<any>} */
export const get = (path, signal) => ask("GET", path, signal ? { signal } : {});

/** Whether the server answers requests without a key. @param {AbortSignal} [signal] */
export async function isOpen(signal) {
  if (!key.value) return true;
  return (await fetch(linkTo("keys"), { cache: "no-store", ...(signal ? { signal } : {}) })).ok;
}

/**
 * Server-sent events as they come. An `event: error` is thrown as a Problem.
 * @param {string} method
 * @param {string} path
 * @param {Options} options
 * @returns {AsyncGenerator<{id: string, data: string}>}
 */
export async function* events(method, path, options) {
  const headers = { ...options.headers, Accept: "text/event-stream" };
  const response = await call(method, path, { ...options, headers });
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const chunk = await reader.read();
      if (chunk.done) return;
      const blocks = (rest + chunk.value).split("\n\n");
      rest = blocks.pop() ?? "";
      for (const block of blocks) {
        const { id, event, data } = fieldsOf(block);
        if (event === "error") throw problemOf(500, data, null);
        if (data) yield { id, data };
      }
    }
  } catch (error) {
    if (error instanceof Problem || options.signal?.aborted) throw error;
    throw new Problem(0, "the connection broke off");
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** @param {string} block an event as sent */
function fieldsOf(block) {
  const fields = { id: "", event: "", data: "" };
  for (const line of block.split("\n")) {
    const [name, value] = [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trimStart()];
    if (name === "id" || name === "event" || name === "data") fields[name] += value;
  }
  return fields;
}

/**
 * Upload files and report progress, which only XMLHttpRequest offers.
 * @param {string} path
 * @param {FormData} form
 * @param {(share: number) => void} onProgress from 0 to 1
 * @returns {Promise<any>}
 */
export async function upload(path, form, onProgress) {
  for (const file of form.values()) {
    if (!(file instanceof File)) continue;
    const reading = file.slice(0, 1).arrayBuffer(); // while sending, a browser reports only that it failed
    await reading.catch(() => {
      throw new Problem(
        0,
        `the file ${file.name} can't be read: it has changed since it was chosen, or is a folder`,
      );
    });
  }
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", linkTo(path));
    for (const [name, value] of Object.entries(headersOf())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.total ? event.loaded / event.total : 0);
    request.onerror = () => reject(new Problem(0, UNREACHABLE));
    request.onload = () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(problemOf(request.status, request.responseText, request.getResponseHeader("retry-after")));
    };
    request.send(form);
  });
}

/**
 * Make the browser save the answer of a path.
 * @param {string} path
 * @param {string} filename
 * @param {Record<string, string>} [headers]
 */
export async function download(path, filename, headers = {}) {
  const response = await call("GET", path, { headers });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The URL of a path of the server, such as its documentation's. @param {string} path */
export const linkTo = (path) => new URL(path.replace(/^\//, ""), ROOT).href;

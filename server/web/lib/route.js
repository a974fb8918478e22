/** Where one is: the part of the address after #, as in #/adapters/codes or #/playground?p=Hello. No server sees it. */
import { Store } from "./store.js";

/** @returns {[string[], string]} its segments, and what follows a "?" */
function read() {
  const [path = "", ...rest] = location.hash.replace(/^#\/?/, "").split("?");
  const segments = path.split("/").filter(Boolean);
  const query = rest.join("?");
  try {
    return [segments.map(decodeURIComponent), query];
  } catch {
    return [segments, query]; // a malformed %: unchanged
  }
}

const [first, firstQuery] = read();

/** The segments of its path. @type {Store<string[]>} */
export const route = new Store(first);

/** What follows a "?": a view's state. It is set before `route`. @type {Store<string>} */
export const query = new Store(firstQuery);

addEventListener("hashchange", () => {
  const [segments, text] = read();
  query.set(text);
  route.set(segments);
});

/** @param {...string} segments */
export const to = (...segments) => `#/${segments.map(encodeURIComponent).join("/")}`;

/** @param {...string} segments */
export const go = (...segments) => {
  location.hash = to(...segments);
};

/**
 * Write a view's state into the address.
 * @param {string} text
 * @param {boolean} isNew whether the browser's Back button returns to the state before
 */
export function setQuery(text, isNew) {
  const path = route.value.length ? to(...route.value) : to("playground");
  const address = text ? `${path}?${text}` : path;
  if (address === location.hash || (!text && !location.hash)) return;
  history[isNew ? "pushState" : "replaceState"](null, "", address);
  query.set(text);
}

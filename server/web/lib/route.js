/** Where one is: the part of the address after #, as in #/adapters/codes. */
import { Store } from "./store.js";

/** @returns {string[]} */
function read() {
  const segments = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean);
  try {
    return segments.map(decodeURIComponent);
  } catch {
    return segments; // a malformed %: unchanged
  }
}

/** Its segments. @type {Store<string[]>} */
export const route = new Store(read());

addEventListener("hashchange", () => route.set(read()));

/** @param {...string} segments */
export const to = (...segments) => `#/${segments.map(encodeURIComponent).join("/")}`;

/** @param {...string} segments */
export const go = (...segments) => {
  location.hash = to(...segments);
};

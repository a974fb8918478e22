/** Who uses the page: an API key, kept by the browser until the tab is closed, and nowhere else. */
import { Store } from "./store.js";

const NAME = "smolora.key";

/** The key, or "" if there is none. @type {Store<string>} */
export const key = new Store(sessionStorage.getItem(NAME) ?? "");

/**
 * Whether the page asks for a key: since the server refused to answer without one, or with this one ("needed"), or
 * since somebody wants to give one ("offered").
 * @type {Store<"" | "needed" | "offered">}
 */
export const asksForKey = new Store(/** @type {"" | "needed" | "offered"} */ (""));

/**
 * A store of values that belong to one key: it is cleared when the key changes.
 * @template T
 * @param {T} value
 * @returns {Store<T>}
 */
export function perKey(value) {
  const store = new Store(value);
  key.listeners.add(() => store.set(value));
  return store;
}

/** @param {string} secret "" signs out */
export function signIn(secret) {
  if (secret) sessionStorage.setItem(NAME, secret);
  else sessionStorage.removeItem(NAME);
  asksForKey.set("");
  key.set(secret);
}

/** Who uses the page: an API key, kept by the browser until the tab is closed, and nowhere else. */
import { Store } from "./store.js";

const NAME = "smolora.key";

/** The key, or "" where there is none. @type {Store<string>} */
export const key = new Store(sessionStorage.getItem(NAME) ?? "");

/** Whether the server has refused to answer without a key, or with this one. @type {Store<boolean>} */
export const isRefused = new Store(false);

/** @param {string} secret "" signs out */
export function signIn(secret) {
  if (secret) sessionStorage.setItem(NAME, secret);
  else sessionStorage.removeItem(NAME);
  isRefused.set(false);
  key.set(secret);
}

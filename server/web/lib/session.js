/** Who uses the page: an API key, kept by the browser until the tab is closed, or on this device if its user says so. */
import { Store } from "./store.js";

const NAME = "smolora.key";

/** The key, or "" if there is none. @type {Store<string>} */
export const key = new Store(sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "");

/** Whether the key is remembered on this device: new tabs have it, and it outlives the browser. */
export const isRemembered = () => localStorage.getItem(NAME) !== null;

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

/** @type {{store: Store<any>, blank: unknown}[]} */
const typed = [];
/** The key that was signed out, and what its user had typed. @type {{secret: string, values: unknown[]} | null} */
let left = null;

/**
 * A store of values that a person typed. Signing out clears it, and signing in again with the same key brings it back.
 * If the server asks for a key or rejects one, the person stays the same: the values are kept for the next key.
 * @template T
 * @param {T} value
 * @returns {Store<T>}
 */
export function perPerson(value) {
  const store = new Store(value);
  typed.push({ store, blank: value });
  return store;
}

/** @param {string} secret "" signs out @param {boolean} [remembers] keep the key on this device */
export function signIn(secret, remembers = false) {
  if (secret) sessionStorage.setItem(NAME, secret);
  else sessionStorage.removeItem(NAME);
  if (remembers && secret) localStorage.setItem(NAME, secret);
  else localStorage.removeItem(NAME);
  change(secret);
}

/** @param {string} secret */
function change(secret) {
  if (!secret && key.value) {
    left = { secret: key.value, values: typed.map(({ store }) => store.value) };
    for (const { store, blank } of typed) store.set(blank);
  } else if (secret && left) {
    const { secret: former, values } = left;
    left = null;
    if (secret === former)
      typed.forEach(({ store, blank }, place) => {
        if (store.value === blank) store.set(values[place]);
      });
  }
  asksForKey.set("");
  key.set(secret);
}

// signing out or in with a remembered key does so in each tab that uses it
addEventListener("storage", ({ key: name, oldValue, newValue }) => {
  if (name !== NAME || (key.value && key.value !== oldValue)) return;
  if (newValue === null) sessionStorage.removeItem(NAME);
  change(newValue ?? "");
});

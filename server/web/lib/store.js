/** A value that views share, with notifications of changes. */
import { useEffect, useState } from "./html.js";

/** @template T */
export class Store {
  /** @param {T} value */
  constructor(value) {
    this.value = value;
    /** @type {Set<(value: T) => void>} */
    this.listeners = new Set();
  }

  /** @param {T} value */
  set(value) {
    if (Object.is(value, this.value)) return;
    this.value = value;
    for (const listener of [...this.listeners]) listener(value);
  }

  /** Changes some fields of a value that is an object. @param {Partial<T>} fields */
  update(fields) {
    this.set({ ...this.value, ...fields });
  }
}

/**
 * The store's value; the component is rendered again when it changes.
 * @template T
 * @param {Store<T>} store
 * @returns {T}
 */
export function useStore(store) {
  const [value, setValue] = useState(store.value);
  useEffect(() => {
    /** @param {T} next */
    const listener = (next) => setValue(() => next);
    store.listeners.add(listener);
    listener(store.value);
    return () => void store.listeners.delete(listener);
  }, [store]);
  return value;
}

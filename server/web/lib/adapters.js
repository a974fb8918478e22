/** The adapters that the key may use: the project's own, and other projects' public ones. */
import { get } from "./api.js";
import { useResource } from "./resource.js";

/** @typedef {{own: Adapter[], shared: Adapter[], isCut: boolean}} Listed `isCut`: there are more than are listed */

const MOST = 500;
const TYPING = 200; // ms

/**
 * @param {AbortSignal} [signal]
 * @param {{name?: string, contains?: string}} [only] the adapter with this name, or adapters with this text in their names
 * @returns {Promise<Listed>}
 */
export async function listAdapters(signal, only = {}) {
  const which = new URLSearchParams({ limit: String(MOST), ...only });
  const [own, shared] = await Promise.all([
    get(`/adapters?${which}`, signal),
    get(`/adapters?public=true&${which}`, signal),
  ]);
  const isOwn = (/** @type {Adapter} */ adapter) => !adapter.name.includes("/"); // public, and past the list of own
  const all = together(own.adapters, shared.adapters.filter(isOwn));
  return {
    own: all,
    shared: together(all, shared.adapters).slice(all.length),
    isCut: Boolean(own.next || shared.next),
  };
}

/**
 * The list and, if it is cut, further adapters with `text` in their names.
 * @param {Listed | null} listed
 * @param {string} text as it is being typed
 * @returns {Listed | null}
 */
export function useSearch(listed, text) {
  const contains = listed?.isCut ? text : "";
  const { data: found } = useResource(
    async (signal) => {
      if (!contains) return null;
      await new Promise((resolve) => setTimeout(resolve, TYPING));
      signal.throwIfAborted();
      return listAdapters(signal, { contains });
    },
    [contains],
    10,
  );
  if (!listed || !found) return listed;
  const own = together(listed.own, found.own);
  const all = together(own, together(listed.shared, found.shared)); // one's own public ones are in both
  return { ...listed, own, shared: all.slice(own.length) };
}

/** @param {Adapter[]} listed @param {Adapter[]} found */
function together(listed, found) {
  const names = new Set(listed.map((adapter) => adapter.name));
  return [...listed, ...found.filter((adapter) => !names.has(adapter.name))];
}

/**
 * Where the API has it. Another project's is its own name there, and an operator's key is at work in that project.
 * @param {string} name
 */
export function placeOf(name) {
  const [own = "", project] = name.split("/").reverse();
  /** @type {Record<string, string>} */
  const headers = project ? { "OpenAI-Project": project } : {};
  return { path: `/adapters/${encodeURIComponent(own)}`, headers };
}

/** Versions, the newest first. @param {Adapter} adapter */
export const newestFirst = (adapter) => [...adapter.versions].sort((one, other) => other.version - one.version);

/**
 * Whether most rows are turns of a chat, so that an adapter trained on them should be asked in a chat; null: not known.
 * @param {Kinds | undefined} kinds
 */
export function isOfChats({ completion = 0, messages = 0, text = 0 } = {}) {
  return completion + messages + text ? messages > completion + text : null;
}

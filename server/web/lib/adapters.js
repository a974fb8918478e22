/** The adapters that the key may use: the project's own, and other projects' public ones. */
import { call } from "./api.js";
import { useResource } from "./resource.js";
import { perKey } from "./session.js";

/** @typedef {{own: Adapter[], shared: Adapter[], isCut: boolean}} Listed `isCut`: there are more than are listed */

const MOST = 500;
const TYPING = 200; // ms
const REMEMBERED = 4; // answers

/** The newest lists by path, with their ETags. @type {import("./store.js").Store<Map<string, {etag: string, answer: any}>>} */
const lists = perKey(new Map());

/** The answer of a path; if it hasn't changed, it isn't sent again. @param {string} path @param {AbortSignal} [signal] */
async function get(path, signal) {
  const known = lists.value.get(path);
  const headers = known ? { "If-None-Match": known.etag } : {};
  const response = await call("GET", path, { headers, ...(signal ? { signal } : {}) });
  if (known && response.status === 304) return known.answer;
  const answer = await response.json();
  const etag = response.headers.get("etag");
  const others = [...lists.value].filter(([of]) => of !== path).slice(1 - REMEMBERED);
  if (etag) lists.set(new Map([...others, [path, { etag, answer }]]));
  return answer;
}

/**
 * Adapters with a new version come first.
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
    own: recentFirst(all),
    shared: recentFirst(together(all, shared.adapters).slice(all.length)),
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

/** When the newest version was made. @param {Adapter} adapter */
export const madeAt = (adapter) => newestFirst(adapter)[0]?.created_at ?? "";

/** @param {Adapter[]} adapters */
const recentFirst = (adapters) =>
  [...adapters].sort((one, other) => {
    const [made, before] = [madeAt(one), madeAt(other)];
    return made < before ? 1 : made > before ? -1 : 0;
  });

/** Versions, the newest first. @param {Adapter} adapter */
export const newestFirst = (adapter) => [...adapter.versions].sort((one, other) => other.version - one.version);

/** The version that a pin of an expression means; "" is the latest. @param {Adapter} adapter @param {string} pin */
export function versionOf({ aliases, latest, versions }, pin) {
  const number = pin ? (aliases[pin] ?? Number(pin)) : latest;
  return versions.find(({ version }) => version === number);
}

/**
 * Whether most rows are turns of a chat, so that an adapter trained on them should be asked in a chat; null: not known.
 * @param {Kinds | undefined} kinds
 */
export function isOfChats({ completion = 0, messages = 0, text = 0 } = {}) {
  return completion + messages + text ? messages > completion + text : null;
}

/** The adapters that one may name: one's own, and other projects' public ones. */
import { get } from "./api.js";

const MOST = 500;

/**
 * @param {AbortSignal} [signal]
 * @param {string} [name] only this one
 * @returns {Promise<{own: Adapter[], shared: Adapter[], isCut: boolean}>} `isCut`: there are more than are listed
 */
export async function listAdapters(signal, name) {
  const which = `limit=${MOST}${name ? `&name=${encodeURIComponent(name)}` : ""}`;
  const [own, shared] = await Promise.all([
    get(`/adapters?${which}`, signal),
    get(`/adapters?public=true&${which}`, signal),
  ]);
  const names = new Set(own.adapters.map((/** @type {Adapter} */ adapter) => adapter.name));
  return {
    own: own.adapters,
    shared: shared.adapters.filter((/** @type {Adapter} */ adapter) => !names.has(adapter.name)),
    isCut: Boolean(own.next || shared.next),
  };
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

/** How much lower the held-out loss is than the base's; null where it wasn't measured. @param {Version} version */
export function gain(version) {
  const { eval_loss: tuned, base_eval_loss: base } = version.metrics;
  return tuned === undefined || base === undefined ? null : { tuned, base };
}

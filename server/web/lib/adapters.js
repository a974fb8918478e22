/** The adapters that one may name: one's own, and other projects' public ones. */
import { get } from "./api.js";

const MOST = 500;

/**
 * @param {AbortSignal} [signal]
 * @returns {Promise<{own: Adapter[], shared: Adapter[], isCut: boolean}>} `isCut`: there are more than are listed
 */
export async function listAdapters(signal) {
  const [own, shared] = await Promise.all([
    get(`/adapters?limit=${MOST}`, signal),
    get(`/adapters?public=true&limit=${MOST}`, signal),
  ]);
  const names = new Set(own.adapters.map((/** @type {Adapter} */ adapter) => adapter.name));
  return {
    own: own.adapters,
    shared: shared.adapters.filter((/** @type {Adapter} */ adapter) => !names.has(adapter.name)),
    isCut: Boolean(own.next || shared.next),
  };
}

/** Versions, the newest first. @param {Adapter} adapter */
export const newestFirst = (adapter) => [...adapter.versions].sort((one, other) => other.version - one.version);

/** How much lower the held-out loss is than the base's; null where it wasn't measured. @param {Version} version */
export function gain(version) {
  const { eval_loss: tuned, base_eval_loss: base } = version.metrics;
  return tuned === undefined || base === undefined ? null : { tuned, base };
}

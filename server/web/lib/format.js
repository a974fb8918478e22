/** Numbers, sizes and times as people read them. */

const COUNT = new Intl.NumberFormat("en");
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** @param {number} value */
export const count = (value) => COUNT.format(value);

/** As in 4.9M. @param {number} value */
export const compact = (value) => COMPACT.format(value);

/** @param {number} value bytes */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86_400)} d`;
}

/** A loss, or another number of about that size. @param {number | null | undefined} value */
export const loss = (value) => (value === null || value === undefined ? "–" : value.toPrecision(3));

const MOMENT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

/** A moment, in the reader's own time. @param {string} iso */
export const moment = (iso) => MOMENT.format(new Date(iso));

/** @param {string} iso */
export function ago(iso) {
  const seconds = (Date.now() - Date.parse(iso)) / 1000;
  return seconds < 5 ? "just now" : `${duration(seconds)} ago`;
}

/** A share as in 93 %, or 0.2 %. @param {number} share from 0 to 1 */
export function percent(share) {
  const value = share * 100;
  return `${value >= 10 ? Math.round(value) : value >= 0.1 ? value.toFixed(1) : value > 0 ? "<0.1" : "0"}\u00a0%`;
}

/** @param {number} number @param {string} one @param {string} [many] */
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

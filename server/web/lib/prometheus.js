/** Prometheus' text format, as /metrics has it. */

/** @typedef {{name: string, labels: Record<string, string>, value: number}} Sample */

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** @param {string} text @returns {Sample[]} */
export function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line);
    if (!found) continue;
    /** @type {Record<string, string>} */
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) labels[name ?? ""] = value ?? "";
    samples.push({ name: found[1] ?? "", labels, value: Number(found[3]) });
  }
  return samples;
}

/** The sum of a metric's samples, of which there is one for each engine replica. @param {Sample[]} samples @param {string} name */
export const valueOf = (samples, name) =>
  samples.filter((sample) => sample.name === name).reduce((sum, sample) => sum + sample.value, 0);

/** The values of a metric by one of its labels, the largest first. @param {Sample[]} samples @param {string} name @param {string} label @returns {[string, number][]} */
export const byLabel = (samples, name, label) =>
  samples
    .filter((sample) => sample.name === name)
    .map((sample) => /** @type {[string, number]} */ ([sample.labels[label] ?? "", sample.value]))
    .sort((one, other) => other[1] - one[1]);

/** @typedef {[number, number][]} Buckets upper bounds, and how many observations are at most that */

/** A histogram's buckets. @param {Sample[]} samples @param {string} name @returns {Buckets} */
export const bucketsOf = (samples, name) =>
  samples
    .filter((sample) => sample.name === `${name}_bucket`)
    .map((sample) => [sample.labels["le"] === "+Inf" ? Infinity : Number(sample.labels["le"]), sample.value]);

/** The observations since an earlier reading; all of them if the server was restarted. @param {Buckets} now @param {Buckets} before @returns {Buckets} */
export function bucketsSince(now, before) {
  const earlier = new Map(before);
  const isRestarted = now.some(([bound, number]) => number < (earlier.get(bound) ?? 0));
  return isRestarted ? now : now.map(([bound, number]) => [bound, number - (earlier.get(bound) ?? 0)]);
}

/** A quantile as Prometheus estimates it; null: nothing was observed. @param {Buckets} buckets @param {number} share */
export function quantile(buckets, share) {
  const rank = share * (buckets.at(-1)?.[1] ?? 0);
  if (!rank) return null;
  const place = buckets.findIndex(([, number]) => number >= rank);
  const [bound, number] = buckets[place] ?? [0, 0];
  const [low, below] = buckets[place - 1] ?? [0, 0];
  return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (number - below);
}

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

/** The value of a sample without labels, or 0. @param {Sample[]} samples @param {string} name */
export const valueOf = (samples, name) => samples.find((sample) => sample.name === name)?.value ?? 0;

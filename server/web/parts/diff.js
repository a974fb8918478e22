/** The differences of two texts, word by word. */
import { html, useMemo } from "../lib/html.js";

const MOST = 2000; // words: a table of their pairs is filled

/** @typedef {{text: string, kind: "same" | "gone" | "new"}} Piece */

/**
 * The second text, with the words that the first has instead: by the longest common subsequence of words.
 * @param {string} from
 * @param {string} to
 * @returns {Piece[]}
 */
export function difference(from, to) {
  const [one, other] = [from, to].map((text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? []);
  if (!one || !other) return [];
  if (one.length > MOST || other.length > MOST)
    return [
      { text: from, kind: "gone" },
      { text: to, kind: "new" },
    ];
  const width = other.length + 1;
  const longest = new Uint16Array((one.length + 1) * width); // of the rest from each pair of places on
  const at = (/** @type {number} */ i, /** @type {number} */ j) => longest[i * width + j] ?? 0;
  for (let i = one.length - 1; i >= 0; i -= 1)
    for (let j = other.length - 1; j >= 0; j -= 1)
      longest[i * width + j] = one[i] === other[j] ? at(i + 1, j + 1) + 1 : Math.max(at(i + 1, j), at(i, j + 1));
  /** @type {Piece[]} */
  const pieces = [];
  const add = (/** @type {string} */ text, /** @type {Piece["kind"]} */ kind) => {
    const last = pieces.at(-1);
    if (last?.kind === kind) last.text += text;
    else pieces.push({ text, kind });
  };
  let [i, j] = [0, 0];
  while (i < one.length || j < other.length) {
    const [left, right] = [one[i], other[j]];
    if (left !== undefined && left === right) {
      add(left, "same");
      i += 1;
      j += 1;
    } else if (left !== undefined && (right === undefined || at(i + 1, j) >= at(i, j + 1))) {
      add(left, "gone");
      i += 1;
    } else if (right !== undefined) {
      add(right, "new");
      j += 1;
    }
  }
  return pieces;
}

/** @param {{from: string, to: string}} props */
export function Diff({ from, to }) {
  const pieces = useMemo(() => difference(from, to), [from, to]);
  return html`<p class="text diff" dir="auto">${pieces.map(({ text, kind }) =>
    kind === "same" ? text : kind === "gone" ? html`<del>${text}</del>` : html`<ins>${text}</ins>`,
  )}</p>`;
}

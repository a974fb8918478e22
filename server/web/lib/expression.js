/** Adapter expressions, as in `codes*0.7+team/tone@2*-0.3`: the API's grammar, read and written. */

import { Problem } from "./api.js";

/** @typedef {{name: string, pin: string, weight: number}} Term `pin`: a version or an alias, "" for the latest */

const NAME = "[A-Za-z0-9][A-Za-z0-9_.\\-]{0,63}";
const TERM = new RegExp(
  `^\\s*((?:${NAME}/)?${NAME})(?:@(${NAME}))?\\s*(?:\\*\\s*(-?(?:\\d+(?:\\.\\d*)?|\\.\\d+)))?\\s*$`,
);

const NAMED = new RegExp(`^${NAME}$`);

/**
 * Check a name that is used in a URL: with a slash it would be another URL. Throws a Problem.
 * @param {string} name
 * @param {string} [field]
 */
export function checked(name, field = "name") {
  if (NAMED.test(name)) return name;
  const message = 'must be 1 to 64 letters, digits, "_", "-" or ".", the first a letter or digit';
  throw new Problem(422, `${field}: ${message}`, [{ loc: [field], message }]);
}

/**
 * Its terms; null if it isn't an expression (the server reports the fault). "" and "base" have none.
 * @param {string} text
 * @returns {Term[] | null}
 */
export function parse(text) {
  if (!text.trim() || text.trim() === "base") return [];
  const terms = [];
  for (const piece of text.split("+")) {
    const found = TERM.exec(piece);
    if (!found) return null;
    terms.push({
      name: found[1] ?? "",
      pin: found[2] ?? "",
      weight: found[3] === undefined ? 1 : Number(found[3]),
    });
  }
  return terms;
}

/** As the grammar has numbers. @param {number} weight */
const written = (weight) => weight.toFixed(12).replace(/\.?0+$/, "");

/** The versions that an answer came from, whatever their names mean by now. @param {Part[]} parts */
export function pinned(parts) {
  return parts.map((part) => `${part.name}@${part.version}*${written(part.weight)}`).join("+");
}

/** @param {Term[]} terms */
export function format(terms) {
  return terms
    .map(({ name, pin, weight }) => name + (pin && `@${pin}`) + (weight === 1 ? "" : `*${written(weight)}`))
    .join("+");
}

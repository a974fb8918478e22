/** Adapter expressions, as in `codes*0.7+team/tone@2*-0.3`: the API's grammar, read and written. */

import { Problem } from "./problem.js";

/** @typedef {{name: string, pin: string, weight: number}} Term `pin`: a version or an alias, "" for the latest */

const NAME = "[A-Za-z0-9][A-Za-z0-9_.\\-]{0,63}";
const TERM = new RegExp(
  `^((?:${NAME}/)?${NAME})(?:@(${NAME}))?(?: *\\* *(-?(?:[0-9]+(?:\\.[0-9]+)?|\\.[0-9]+)))?$`,
);
const [MOST_LETTERS, MOST_TERMS, MOST_WEIGHT] = [4096, 16, 100];

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
 * @param {string} text with spaces around it, as it may be typed
 * @returns {Term[] | null}
 */
export function parse(text) {
  const whole = text.trim();
  if (!whole || whole === "base") return [];
  if (whole.length > MOST_LETTERS) return null;
  const terms = whole.split(/ *\+ */).map(termOf);
  const found = terms.filter((term) => term !== null);
  return found.length === terms.length && found.length <= MOST_TERMS ? found : null;
}

/** @param {string} piece @returns {Term | null} */
function termOf(piece) {
  const [isTerm, name = "", pin = "", weight = "1"] = TERM.exec(piece) ?? [];
  if (isTerm === undefined || name.split("/").at(-1) === "base") return null;
  if (/^0+$/.test(pin) || Math.abs(Number(weight)) > MOST_WEIGHT) return null;
  return { name, pin, weight: Number(weight) };
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

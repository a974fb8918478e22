/** The page's grammar of expressions, on the cases that the server's parser is tested with. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { format, parse } from "../../server/web/lib/expression.js";

const { valid, invalid } = JSON.parse(readFileSync(new URL("../kits/expressions.json", import.meta.url), "utf-8"));

for (const { text, terms } of valid)
  test(`reads ${text.slice(0, 40)}`, () => {
    assert.deepEqual(parse(text), terms);
    assert.deepEqual(parse(format(terms)), terms);
  });
for (const text of invalid) test(`refuses ${text.slice(0, 40)}`, () => assert.equal(parse(text), null));
test("ignores spaces around it, as it may be typed", () => assert.deepEqual(parse(" a "), parse("a")));
test("reads nothing as the base", () => assert.deepEqual(parse(""), []));

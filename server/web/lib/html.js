/** Preact with htm's templates: what every part and view is written in. */
import htm from "../vendor/htm.mjs";
import { h } from "../vendor/preact.mjs";

export { render } from "../vendor/preact.mjs";
export { useCallback, useEffect, useId, useMemo, useRef, useState } from "../vendor/hooks.mjs";

export const html = htm.bind(h);

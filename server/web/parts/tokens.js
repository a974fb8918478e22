/** An answer's tokens, shaded by the change of their log-probability from the base to the answer's adapters. */
import { percent } from "../lib/format.js";
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../lib/html.js";

/** @import { Scores } from "../lib/generation.js" */

const STEPS = 4;
/** Nats of one step of shade; beyond STEPS steps the shade doesn't change. */
const NATS = 0.75;

/** @param {number} change nats */
function toneOf(change) {
  const step = Math.min(STEPS, Math.round(Math.abs(change) / NATS));
  return step ? `${change > 0 ? "up" : "down"}-${step}` : "";
}

/** Make line ends and other blanks visible. @param {string} text */
const visible = (text) =>
  text
    .replace(/\n/g, "⏎")
    .replace(/\t/g, "⇥")
    .replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));

/**
 * @typedef {{text: string, tuned: ScoredToken, base: ScoredToken | undefined}} Token `base`: undefined for the base's own
 */

/**
 * The tokens of the text. A character made of several tokens, like most emoji, belongs to the last one. Special tokens,
 * such as an end, have no bytes, and aren't of the text.
 * @param {Scores} scores
 * @returns {Token[]}
 */
function tokensOf({ tuned, base }) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return tuned.flatMap((token, place) =>
    token.bytes.length
      ? [
          {
            text: decoder.decode(new Uint8Array(token.bytes), { stream: true }),
            tuned: token,
            base: base?.[place],
          },
        ]
      : [],
  );
}

/** Whether a text's tokens can be shown: those of the base, or those that were scored under it. @param {Scores} scores @param {boolean} isBase */
export const isScored = ({ tuned, base }, isBase) => tuned.length > 0 && (isBase || base?.length === tuned.length);

/**
 * For the token at the pointer, or at the arrow keys while `isInspected`: its probability and those of the likeliest
 * alternatives, in both models. Otherwise screen readers get the plain text, which the caller shows.
 * @param {{scores: Scores, expression: string, isInspected: boolean}} props
 */
export function ShadedText({ scores, expression, isInspected }) {
  const [chosen, choose] = useState(-1);
  const [isPinned, pin] = useState(false);
  const group = useRef(/** @type {HTMLDivElement | null} */ (null));
  const tokens = useMemo(() => tokensOf(scores), [scores, scores.tuned.length]);
  const at = tokens[chosen];
  useEffect(() => {
    if (isInspected) focus(0);
    else choose(-1);
  }, [isInspected]);

  /** @param {number} place */
  const focus = (place) => /** @type {HTMLElement | undefined} */ (group.current?.children[place])?.focus();

  /** @param {KeyboardEvent} event */
  function move(event) {
    if (event.key === "Escape") choose(-1);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    focus(Math.max(0, Math.min(tokens.length - 1, chosen + step)));
  }

  const leave = () => {
    if (!isPinned && !group.current?.contains(document.activeElement)) choose(-1);
  };
  return html`<div onMouseLeave=${leave}>
    <div
      class="tokens"
      dir="auto"
      ...${isInspected ? { role: "group", "aria-label": "Tokens: arrow keys walk through them", onKeyDown: move } : { "aria-hidden": "true" }}
      ref=${group}
    >
      ${tokens.map(({ text, tuned, base }, place) => {
        const change = base ? tuned.logprob - base.logprob : 0;
        // not a <button>: Arabic letters are joined and ordered only across inline elements
        const inspected = {
          role: "button",
          tabindex: place === Math.max(chosen, 0) ? 0 : -1,
          "aria-pressed": place === chosen,
          "aria-label": `${text ? visible(text) : "part of a character"}, ${wordsOf(tuned, base)}`,
          onFocus: () => choose(place),
        };
        return html`<span
          class="token ${toneOf(change)}${place === chosen ? " at" : ""}"
          ...${isInspected ? inspected : {}}
          onMouseEnter=${() => isPinned || choose(place)}
          onClick=${() => {
            const isClosed = isPinned && place === chosen; // a second click or tap
            pin(!isClosed);
            choose(isClosed ? -1 : place);
          }}
        >${text}</span>`;
      })}
    </div>
    ${at ? html`<${Inspector} token=${at} place=${chosen} expression=${expression} group=${group} />` : null}
  </div>`;
}

/** @param {ScoredToken} tuned @param {ScoredToken | undefined} base */
function wordsOf(tuned, base) {
  if (!base) return percent(Math.exp(tuned.logprob));
  const change = tuned.logprob - base.logprob;
  const times = Math.exp(Math.abs(change));
  if (times < 1.05) return "as likely as under the base";
  const many = times >= 1000 ? "over 1,000" : times >= 10 ? times.toFixed(0) : times.toFixed(1);
  return `${many} times ${change > 0 ? "more" : "less"} likely than under the base`;
}

const GAP = 4; // px

/**
 * The likeliest tokens at a place, under both models, at that token: below it, or above it if the window ends there. As
 * a popover, it isn't cut off by the board, which scrolls.
 * @param {{token: Token, place: number, expression: string, group: {current: HTMLElement | null}}} props
 */
function Inspector({ token, place, expression, group }) {
  const box = useRef(/** @type {HTMLDivElement | null} */ (null));
  const put = () => {
    const element = /** @type {HTMLElement | undefined} */ (group.current?.children[place]);
    const line = element?.getClientRects()[0]; // of a token across two lines, the first part
    if (!line || !box.current) return;
    const { offsetWidth: width, offsetHeight: height } = box.current;
    const isBelow = line.bottom + GAP + height <= innerHeight || line.top - GAP - height < 0;
    const top = isBelow ? line.bottom + GAP : line.top - GAP - height;
    const left = Math.max(GAP, Math.min(line.left, document.body.clientWidth - width - GAP));
    box.current.style.transform = `translate(${left}px, ${top}px)`;
  };
  useLayoutEffect(() => box.current?.showPopover(), []);
  useLayoutEffect(() => {
    put();
    for (const type of ["scroll", "resize"]) addEventListener(type, put, true);
    return () => {
      for (const type of ["scroll", "resize"]) removeEventListener(type, put, true);
    };
  });
  return html`<div class="inspector" popover="manual" ref=${box}>
    ${token.base ? html`<${Likeliest} title="base" chosen=${token.base} />` : null}
    <${Likeliest} title=${expression} chosen=${token.tuned} />
  </div>`;
}

/** @param {{title: string, chosen: ScoredToken}} props */
function Likeliest({ title, chosen }) {
  const top = chosen.top ?? [];
  const rows = top.some((token) => token.token === chosen.token) ? top : [...top.slice(0, -1), chosen];
  return html`<table class="likeliest">
    <caption>
      ${title}
    </caption>
    <tbody>
      ${rows.map((token) => {
        const share = Math.exp(token.logprob);
        return html`<tr class=${token.token === chosen.token ? "chosen" : ""}>
          <th scope="row">${visible(token.token)}</th>
          <td><meter min="0" max="1" value=${share} aria-label="probability"></meter></td>
          <td class="number">${percent(share)}</td>
        </tr>`;
      })}
    </tbody>
  </table>`;
}

/** A text whose tokens are shaded by the change of their log-probability from the base to an adapter. */
import { percent } from "../lib/format.js";
import { html, useMemo, useRef, useState } from "../lib/html.js";

/**
 * @typedef {{tuned: ScoredToken[], base: ScoredToken[]}} Shades each with one entry a token
 */

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
 * The text of each token. A character made of several tokens, like most emoji, belongs to the last one. Special tokens,
 * such as an end, have no bytes.
 * @param {ScoredToken[]} tokens
 */
function textsOf(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return tokens.map(({ token, bytes }) =>
    bytes.length ? decoder.decode(new Uint8Array(bytes), { stream: true }) : token,
  );
}

/**
 * For the token at the pointer or arrow keys: its probability and those of the likeliest alternatives, in both models.
 * @param {{shades: Shades, expression: string}} props
 */
export function ShadedText({ shades, expression }) {
  const [chosen, choose] = useState(0);
  const group = useRef(/** @type {HTMLDivElement | null} */ (null));
  const tuned = shades.tuned[chosen];
  const base = shades.base[chosen];
  const texts = useMemo(() => textsOf(shades.tuned), [shades]);

  /** @param {KeyboardEvent} event */
  function move(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(shades.tuned.length - 1, chosen + step));
    choose(next);
    /** @type {HTMLElement | undefined} */ (group.current?.children[next])?.focus();
  }

  return html`<div>
    <div class="tokens" dir="auto" role="group" aria-label="Tokens, shaded: arrow keys walk through them" ref=${group} onKeyDown=${move}>
      ${shades.tuned.map((token, place) => {
        const change = token.logprob - (shades.base[place]?.logprob ?? 0);
        const text = texts[place] ?? "";
        // not a <button>: Arabic letters are joined and ordered only across inline elements
        return html`<span
          role="button"
          class="token ${toneOf(change)}"
          tabindex=${place === chosen ? 0 : -1}
          aria-pressed=${place === chosen}
          aria-label="${text ? visible(text) : "part of a character"}, ${wordsOf(change)}"
          onMouseEnter=${() => choose(place)}
          onFocus=${() => choose(place)}
          onClick=${() => choose(place)}
        >${text}</span>`;
      })}
    </div>
    <p class="legend">
      <span class="token down-4">less</span> and <span class="token up-4">more</span> likely than under the base. Point at one, or
      walk through them by arrow keys: the likeliest in its place, under both.
    </p>
    ${
      tuned && base
        ? html`<div class="alternatives">
          <${Likeliest} title="base" chosen=${base} />
          <${Likeliest} title=${expression} chosen=${tuned} />
        </div>`
        : null
    }
  </div>`;
}

/** @param {number} change nats */
function wordsOf(change) {
  const times = Math.exp(Math.abs(change));
  if (times < 1.05) return "as likely as under the base";
  const many = times >= 1000 ? "over 1,000" : times >= 10 ? times.toFixed(0) : times.toFixed(1);
  return `${many} times ${change > 0 ? "more" : "less"} likely than under the base`;
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

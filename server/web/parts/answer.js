/** One expression's thread: its questions and answers as they stream; their tokens are shaded at the end. */
import { html, useRef, useState } from "../lib/html.js";
import { count, duration, plural } from "../lib/format.js";
import { lazy } from "../lib/lazy.js";
import { asked, edit, goOn, regenerate } from "../lib/playground.js";
import { useStore } from "../lib/store.js";
import { Badge, Warnings } from "./basics.js";
import { ShadedText, isScored } from "./tokens.js";

/** @import { Turn } from "../lib/generation.js" */
/** @import { Column, Run } from "../lib/playground.js" */
/** @import { Typed } from "./basics.js" */

const Diff = lazy(async () => (await import("./diff.js")).Diff);

/** How answers are shown: "tokens", "plain", or the number of the column from which differences are marked. @typedef {string} Show */

/** @param {{run: Run, place: number, show: Show}} props */
export function AnswerColumn({ run, place, show }) {
  const column = /** @type {Column} */ (run.columns[place]);
  const { expression, turns, state } = column;
  const isRunning = state === "running";
  const [isInspected, inspect] = useState(false);
  const last = turns.at(-1);
  const isBase = expression === "base";
  const other = show === String(place) ? undefined : run.columns[Number(show)];
  const hasTokens = show === "tokens" && !isRunning && turns.some((turn) => isScored(turn.scores, isBase));
  return html`<article class="card answer" aria-label="Answer of ${expression}" aria-busy=${isRunning}>
    <h2><code>${expression}</code> ${isRunning ? html`<${Badge} tone="busy">writing<//>` : null} ${state === "stopped" ? html`<${Badge}>stopped<//>` : null}</h2>
    ${turns.map((turn, number) => {
      const isShaded = hasTokens && isScored(turn.scores, isBase);
      const from = isRunning ? undefined : other?.turns[number];
      return html`${turns.length > 1 ? html`<${Question} run=${run} number=${number} turn=${turn} isRunning=${isRunning} />` : null}
        ${
          from
            ? html`<${Diff} key=${`diff ${number}`} from=${from.answer.text} to=${turn.answer.text} />`
            : html`<p class="text ${isShaded ? "hidden" : ""}" dir="auto" hidden=${isShaded && isInspected}>${turn.answer.text}</p>`
        }
        ${isShaded ? html`<${ShadedText} scores=${turn.scores} expression=${expression} isInspected=${isInspected && turn === last} />` : null}`;
    })}
    ${last && !last.answer.text && last.answer.finishReason ? html`<p class="muted">It ended at once, without any text.</p>` : null}
    <${Warnings} warnings=${last?.answer.warnings ?? []} />
    ${last && !isRunning ? html`<${Facts} run=${run} place=${place} column=${column} turn=${last} />` : null}
    ${
      hasTokens
        ? html`<p><button type="button" class="link" aria-pressed=${isInspected} onClick=${() => inspect(!isInspected)}>Inspect tokens</button></p>`
        : null
    }
  </article>`;
}

/** What is known of a column's last answer, and what can be done with it. @param {{run: Run, place: number, column: Column, turn: Turn}} props */
function Facts({ run, place, column, turn }) {
  const { answer } = turn;
  const request = useStore(asked);
  const isSampled = run.request.temperature !== 0;
  const isCut = Boolean(answer.text) && (answer.finishReason === "length" || column.state === "stopped");
  return html`${
    answer.finishReason
      ? html`<small class="facts">
          ${plural(answer.tokens, "token")} in ${duration(answer.total)}, the first after ${duration(answer.ttft)}; prompt: ${plural(answer.prompt, "token")}${answer.cached ? `, ${count(answer.cached)} cached` : ""}${answer.finishReason === "length" ? "; stopped at max tokens" : ""}
        </small>`
      : null
  }
    ${
      answer.adapters.length
        ? html`<small class="muted facts">${answer.adapters.map((part) => `${part.name}@${part.version}${part.weight === 1 ? "" : ` × ${Number(part.weight.toFixed(4))}`}`).join(" + ")}</small>`
        : null
    }
    <p class="row">
      ${isCut ? html`<button type="button" class="plain" onClick=${() => goOn(run, place)}>Continue</button>` : null}
      ${isSampled || column.state === "stopped" ? html`<button type="button" class="plain" onClick=${() => regenerate(run, place)}>Regenerate</button>` : null}
      ${
        isSampled && answer.seed !== null
          ? html`<button type="button" class="link" title="Use this seed from now on" disabled=${request.seed === answer.seed} onClick=${() => asked.update({ seed: answer.seed })}>Seed ${answer.seed}${request.seed === answer.seed ? ", pinned" : ""}</button>`
          : null
      }
    </p>`;
}

/** A question of a thread, which can be asked in other words. @param {{run: Run, number: number, turn: Turn, isRunning: boolean}} props */
function Question({ run, number, turn, isRunning }) {
  const [text, setText] = useState(/** @type {string | null} */ (null));
  const opener = useRef(/** @type {HTMLButtonElement | null} */ (null));
  const close = () => {
    setText(null);
    setTimeout(() => opener.current?.focus());
  };
  if (text === null)
    return html`<div class="asked">
      <p class="text" dir="auto"><span class="hidden">Question: </span>${turn.asked}</p>
      <button type="button" class="link" disabled=${isRunning} ref=${opener} onClick=${() => setText(turn.asked)}>Edit</button>
    </div>`;
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (!text) return;
    close();
    edit(run, number, text);
  };
  return html`<form class="asked" onSubmit=${submit}>
    <textarea aria-label="Question" dir="auto" rows="3" value=${text} ref=${(/** @type {HTMLElement | null} */ area) => text === turn.asked && area?.focus()}
      onInput=${(/** @type {Typed} */ event) => setText(event.currentTarget.value)}></textarea>
    <p class="row">
      <button type="submit" disabled=${!text}>Ask all again</button>
      <button type="button" class="plain" onClick=${close}>Cancel</button>
    </p>
  </form>`;
}

/** One expression's answer as it streams; it is shaded at the end. */
import { html, useState } from "../lib/html.js";
import { count, duration, plural } from "../lib/format.js";
import { Badge, Check, Fault, Warnings } from "./basics.js";
import { ShadedText } from "./tokens.js";

/** @param {{column: import("../lib/playground.js").Column}} props */
export function AnswerColumn({ column }) {
  const { expression, answer, state, problem, shades } = column;
  const isRunning = state === "running";
  const [isShaded, setShaded] = useState(true);
  return html`<article class="card answer" aria-label="Answer of ${expression}" aria-busy=${isRunning}>
    <h2><code>${expression}</code> ${isRunning ? html`<${Badge} tone="busy">writing<//>` : null} ${state === "stopped" ? html`<${Badge}>stopped<//>` : null}</h2>
    ${shades && isShaded ? html`<${ShadedText} shades=${shades} expression=${expression} />` : html`<p class="text" dir="auto" aria-live="polite">${answer.text}</p>`}
    ${!answer.text && answer.finishReason ? html`<p class="muted">It ended at once, without any text.</p>` : null}
    <${Fault} problem=${problem} />
    <${Warnings} warnings=${answer.warnings} />
    ${
      answer.finishReason
        ? html`<p class="row">
          <small>
            ${plural(answer.tokens, "token")} in ${duration(answer.total)}, the first after ${duration(answer.ttft)}${answer.cached ? `; ${count(answer.cached)} of the prompt were remembered` : ""}${answer.finishReason === "length" ? "; stopped at the longest answer that was asked for" : ""}
          </small>
          ${
            shades
              ? html`<${Check} checked=${isShaded} onChange=${() => setShaded(!isShaded)}>shade changes<//>`
              : null
          }
        </p>`
        : null
    }
    ${
      answer.adapters.length
        ? html`<small class="muted">${answer.adapters.map((part) => `${part.name}@${part.version}${part.weight === 1 ? "" : ` × ${Number(part.weight.toFixed(4))}`}`).join(" + ")}</small>`
        : null
    }
  </article>`;
}

/** Answers to held-out prompts while a job trains: the newest, or those of the weights that it kept, and others. */
import { count, plural } from "../lib/format.js";
import { html, useMemo } from "../lib/html.js";
import { Badge } from "./basics.js";

const MOST_LETTERS = 300; // of a prompt, before it is opened

/** @typedef {{step: number, samples: EventSample[]}} Answered */

/** Each step's samples, the newest first. @param {JobEvent[]} events @returns {Answered[]} */
const answered = (events) =>
  events
    .flatMap(({ data: { step, samples } }) => (samples?.length && step ? [{ step, samples }] : []))
    .sort((one, other) => other.step - one.step);

/** @param {{events: JobEvent[], kept: number | null}} props of one job `kept`: the step whose weights it kept */
export function Samples({ events, kept }) {
  const steps = useMemo(() => {
    const isKept = (/** @type {Answered} */ { step }) => step === kept;
    return answered(events).sort((one, other) => Number(isKept(other)) - Number(isKept(one)));
  }, [events, kept]);
  const [newest] = steps;
  if (!newest) return null;
  return html`<section aria-label="Answers while training">
    <h3>Answers to held-out prompts</h3>
    ${newest.samples.map(({ prompt, wanted, base }, place) => {
      const answers = steps.map(
        ({ step, samples }) =>
          html`<dt>Step ${count(step)}</dt><dd><${Answer} text=${samples[place]?.tuned} wanted=${wanted} /></dd>`,
      );
      return html`<article key=${prompt} class="card" aria-label="Prompt ${place + 1}">
        <${Prompt} text=${prompt} />
        <dl>
          <dt>Wanted</dt><dd class="text" dir="auto">${wanted.trim()}</dd>
          ${answers[0]}
          <dt>Base</dt><dd><${Answer} text=${base} wanted=${wanted} /></dd>
        </dl>
        ${
          answers.length > 1
            ? html`<details>
                <summary>${plural(answers.length - 1, "other answer")}</summary>
                <dl>${answers.slice(1)}</dl>
              </details>`
            : null
        }
      </article>`;
    })}
  </section>`;
}

/** @param {{text: string}} props */
function Prompt({ text }) {
  if (text.length <= MOST_LETTERS) return html`<p class="text" dir="auto">${text}</p>`;
  return html`<details>
    <summary dir="auto">${text.slice(0, MOST_LETTERS)}…</summary>
    <p class="text" dir="auto">${text}</p>
  </details>`;
}

/** @param {{text: string | null | undefined, wanted: string}} props */
function Answer({ text, wanted }) {
  if (text === null || text === undefined) return "–";
  const isRight = text.trim() === wanted.trim();
  return html`${isRight ? html`<${Badge} tone="good">right<//> ` : null}<span class="text" dir="auto">${text.trim() || "(nothing)"}</span>`;
}

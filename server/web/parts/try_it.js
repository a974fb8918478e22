/** Base and adapter side by side: on the job's rows, held-out ones first, and on prompts of one's own. */
import { ask } from "../lib/api.js";
import { isOfChats } from "../lib/adapters.js";
import { html, useEffect, useState } from "../lib/html.js";
import { useAction, useIsShown, useResource } from "../lib/resource.js";
import { Badge, Choice, Fault, Form, Table, TextField } from "./basics.js";

const MOST_LETTERS = 100; // of a text in the table
const MOST_ROWS = 5000; // all of them are read for the few that are shown

/**
 * Some of the job's rows: the request's own rows aren't kept, and the data set may be gone, or be split otherwise now.
 * @param {Job} job
 * @param {AbortSignal} signal
 * @returns {Promise<Sample[]>}
 */
async function samplesOf({ name, config: { dataset, validation, test, training }, data }, signal) {
  if (!dataset || validation === "rows" || !data || data.rows + data.validation_rows > MOST_ROWS) return [];
  const { max_length, overlong } = training ?? {}; // which decide what becomes of long rows
  const aside = test && test !== "rows" ? { test } : {};
  const json = { name, dataset, validation: validation ?? null, ...aside, training: { max_length, overlong } };
  /** @type {DryRun} */
  const found = await ask("POST", "/train?dry_run=true", { json, signal });
  const isSame = found.data.digest === data.digest && found.data.validation_digest === data.validation_digest;
  return isSame ? found.samples : [];
}

/** What the base and the adapter answer. @param {object} asked a prompt or messages @param {string} adapter @returns {Promise<string[]>} */
async function answersTo(asked, adapter) {
  const json = { ...asked, adapters: ["base", adapter], max_tokens: 64, temperature: 0 };
  const { results } = await ask("POST", "/compare", { json });
  return results.map((/** @type {any} */ result) => result.choices[0].text);
}

/** @param {{job: Job}} props of a job that has published */
export function TryIt({ job }) {
  const [prompt, setPrompt] = useState("");
  const [isChat, setChat] = useState(false);
  const [answers, setAnswers] = useState(/** @type {string[]} */ ([]));
  const used = job.adapter ? `${job.adapter.name}@${job.adapter.version}` : "base";
  const compare = useAction(async () => {
    setAnswers(await answersTo(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }, used));
  });
  const samples = useResource((signal) => samplesOf(job, signal), [job.id]);
  // jobs of earlier versions don't say which kinds of rows they had
  const isOfTurns = isOfChats(job.data?.kinds) ?? Boolean(samples.data?.[0]?.messages);
  useEffect(() => setChat(isOfTurns), [isOfTurns]);
  return html`${samples.data?.length ? html`<${Rows} samples=${samples.data} adapter=${used} onChoose=${setPrompt} />` : null}
    <${Form} label="Compare" className="try" onSubmit=${compare.run}>
      <${Choice} legend="Kind of prompt" name="try-kind" value=${isChat} words=${["Question", "Text to continue"]} onChange=${setChat} />
      <div class="row end">
        <${TextField} label="Prompt, as in your rows" name="prompt" problem=${compare.problem} className="wide" value=${prompt} onChange=${setPrompt} />
        <button type="submit" disabled=${!prompt || compare.busy}>Compare</button>
      </div>
    <//>
    <${Fault} problem=${compare.problem} beside=${["prompt", "messages"]} />
    <div class="compared" aria-live="polite">
      ${answers.map(
        (text, place) =>
          html`<div class="card answer">
            <h3><code>${place ? used : "base"}</code></h3>
            <p class="text" dir="auto">${text || "(nothing)"}</p>
          </div>`,
      )}
    </div>`;
}

/** @param {{samples: Sample[], adapter: string, onChoose: (prompt: string) => void}} props */
function Rows({ samples, adapter, onChoose }) {
  const [answers, setAnswers] = useState(/** @type {string[][]} */ ([]));
  const isShown = useIsShown();
  const answer = useAction(async () => {
    setAnswers([]);
    for (const { held_out, completion, ...asked } of samples) {
      const found = await answersTo(asked, adapter);
      if (!isShown()) return;
      setAnswers((before) => [...before, found]);
    }
  });
  return html`<${Table} label="Rows and answers" columns=${["Row", "Prompt", "Its answer", "Base", adapter]}>
      ${samples.map((sample, place) => {
        const alone = sample.prompt ?? (sample.messages?.length === 1 ? sample.messages[0]?.content : undefined);
        const asked = short(alone ?? sample.messages?.at(-1)?.content ?? "");
        return html`<tr>
          <td><${Badge} tone=${sample.held_out ? "busy" : ""}>${sample.held_out ? "not trained on" : "trained on"}<//></td>
          <th scope="row" dir="auto" class="wraps">
            ${alone === undefined ? asked : html`<button type="button" class="link" onClick=${() => onChoose(alone)}>${asked}</button>`}
          </th>
          <td dir="auto" class="wraps">${short(sample.completion)}</td>
          ${[0, 1].map((of) => html`<td dir="auto" class="wraps"><${Answer} text=${answers[place]?.[of]} wanted=${sample.completion} /></td>`)}
        </tr>`;
      })}
    <//>
    <p><button type="button" class="plain" disabled=${answer.busy} onClick=${() => answer.run()}>Answer these rows</button></p>
    <${Fault} problem=${answer.problem} />`;
}

/** @param {{text: string | undefined, wanted: string}} props */
function Answer({ text, wanted }) {
  if (text === undefined) return "–";
  const isRight = text.trim() === wanted.trim();
  return html`${isRight ? html`<${Badge} tone="good">right<//> ` : null}${short(text) || "(nothing)"}`;
}

/** On one line, and cut if it is long. @param {string} text */
function short(text) {
  const line = text.trim().replaceAll(/\s+/g, " ");
  return line.length > MOST_LETTERS ? `${line.slice(0, MOST_LETTERS)}…` : line;
}

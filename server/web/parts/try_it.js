/** Base and adapter side by side, by one request to /compare. */
import { ask, get } from "../lib/api.js";
import { html, useEffect, useState } from "../lib/html.js";
import { useAction, useResource } from "../lib/resource.js";
import { Choice, Fault, Form, TextField } from "./basics.js";

const MOST_ROWS = 5000; // all of them are tokenized for the few that are shown

/**
 * Whether a job's rows are turns of a chat, and the prompts of its first rows.
 * @param {Job} job
 * @param {AbortSignal} signal
 */
async function rowsOf(job, signal) {
  const { dataset } = job.config;
  if (!dataset) return { isChat: false, prompts: [] };
  const { kinds, rows } = await get(`/datasets/${encodeURIComponent(dataset)}`, signal);
  if (kinds.messages) return { isChat: true, prompts: [] };
  if (!kinds.completion || rows > MOST_ROWS) return { isChat: false, prompts: [] };
  /** @type {DryRun} */
  const found = await ask("POST", "/train?dry_run=true", {
    json: { name: job.name, dataset, validation: 0 },
    signal,
  });
  const prompts = found.preview.map(({ tokens }) =>
    tokens
      .filter((token) => !token.trained)
      .map((token) => token.text)
      .join(""),
  );
  return { isChat: false, prompts };
}

/** @param {{job: Job}} props of a job that has published */
export function TryIt({ job }) {
  const [prompt, setPrompt] = useState("");
  const [isChat, setChat] = useState(false);
  const [results, setResults] = useState(/** @type {any[]} */ ([]));
  const used = job.adapter ? `${job.adapter.name}@${job.adapter.version}` : "base";
  const compare = useAction(async () => {
    const asked = isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    const json = { ...asked, adapters: ["base", used], max_tokens: 64, temperature: 0 };
    setResults((await ask("POST", "/compare", { json })).results);
  });
  const rows = useResource((signal) => rowsOf(job, signal), [job.id]);
  useEffect(() => setChat(rows.data?.isChat ?? false), [rows.data]);
  return html`<${Form} label="Compare" className="try" onSubmit=${compare.run}>
      <${Choice} legend="Kind of prompt" name="try-kind" value=${isChat} words=${["Question", "Text to continue"]} onChange=${setChat} />
      <div class="row end">
        <${TextField} label="Prompt, as in your rows" name="prompt" problem=${compare.problem} className="wide" value=${prompt} onChange=${setPrompt} />
        <button type="submit" disabled=${!prompt || compare.busy}>Compare</button>
      </div>
      ${
        rows.data?.prompts.length
          ? html`<p class="row">
            <small>From your rows:</small>
            ${rows.data.prompts.map((of) => html`<button type="button" class="plain" onClick=${() => setPrompt(of)}>${of.length > 60 ? `${of.slice(0, 60)}…` : of}</button>`)}
          </p>`
          : null
      }
    <//>
    <${Fault} problem=${compare.problem} beside=${["prompt", "messages"]} />
    <div class="compared" aria-live="polite">
      ${results.map(
        (result) =>
          html`<div class="card answer">
            <h3><code>${result.adapter}</code></h3>
            <p class="text" dir="auto">${result.choices[0].text || "(nothing)"}</p>
          </div>`,
      )}
    </div>`;
}

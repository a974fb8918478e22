/** Decisions: probabilities of an input's answers, and what a report says about how far to trust them. */
import { ask } from "../lib/api.js";
import { percent, plural } from "../lib/format.js";
import { html, useMemo, useState } from "../lib/html.js";
import { useAction } from "../lib/resource.js";
import { Badge, Fault, Form, SelectField, Table, TextField, Warnings } from "./basics.js";
import { Chart } from "./chart.js";

/**
 * @typedef {{low: number, high: number, num_rows: number, confidence: number, accuracy: number}} Bin
 * @typedef {{num_rows: number, summary: string, reliability?: Bin[],
 *   confusion?: {options: string[], counts: number[][]}}} QuestionReport
 * @typedef {{type: string, name: string | null, probability?: number,
 *   probabilities?: {value: string | boolean | number, label?: string, probability: number}[]}} Answer
 */

const MOST_SHOWN = 20;

/** The options and their probabilities, likeliest first. @param {Answer} answer @returns {[string, number][]} */
function likeliest({ probability = 0, probabilities }) {
  /** @type {[string, number][]} */
  const found = probabilities?.map((one) => [String(one.label ?? one.value), one.probability]) ?? [
    ["yes", probability],
    ["no", 1 - probability],
  ];
  return found.sort((one, other) => other[1] - one[1]).slice(0, MOST_SHOWN);
}

/** @param {{adapter: string, reports: Record<string, QuestionReport>}} props `reports`: by the questions' names */
export function Decide({ adapter, reports }) {
  const [input, setInput] = useState("");
  const [result, setResult] = useState(/** @type {any} */ (null));
  const decide = useAction(async () => setResult(await ask("POST", "/decide", { json: { adapter, input } })));
  return html`<h3>Decide</h3>
    <${Form} label="Decide" className="row end" onSubmit=${decide.run}>
      <${TextField} label="Input" name="input" problem=${decide.problem} className="wide" value=${input} onChange=${setInput} />
      <button type="submit" disabled=${!input || decide.busy}>Decide</button>
    <//>
    <${Fault} problem=${decide.problem} beside=${["input"]} />
    ${result ? html`<${Warnings} warnings=${result.warnings} />` : null}
    <div aria-live="polite">
      ${result?.results[0].answers.map(
        (/** @type {Answer} */ answer) =>
          html`<${Answered} key=${answer.name} answer=${answer} report=${reports[answer.name ?? ""]} />`,
      )}
      ${result && !result.calibrated ? html`<p class="muted">Not calibrated: too few rows were held out to fit a temperature.</p>` : null}
    </div>`;
}

/** @param {{answer: Answer, report: QuestionReport | undefined}} props */
function Answered({ answer, report }) {
  const [least, setLeast] = useState("0");
  const options = likeliest(answer);
  const [chosen = "", confidence = 0] = options[0] ?? [];
  const isSure = confidence >= Number(least);
  return html`<div class="card" role="group" aria-label=${answer.name ?? "Answer"}>
    <p><strong>${answer.name}</strong> <${Badge} tone=${isSure ? "good" : "busy"}>${isSure ? chosen : "unsure"}<//></p>
    <${Table} label="Probabilities of ${answer.name}" columns=${["Answer", "Probability", "#Share"]}>
      ${options.map(
        ([text, probability]) =>
          html`<tr>
            <th scope="row" class="wraps" dir="auto">${text}</th>
            <td><meter aria-label="Probability of ${text}" value=${probability} max="1"></meter></td>
            <td class="number">${percent(probability)}</td>
          </tr>`,
      )}
    <//>
    ${
      report?.reliability?.length
        ? html`<${SelectField} label="Answer only if it is at least this likely" value=${least} options=${thresholds(report.reliability)} onChange=${setLeast} />`
        : null
    }
  </div>`;
}

/** The bins' lower ends, and how many held-out rows are above them. @param {Bin[]} bins @returns {[string, string][]} */
function thresholds(bins) {
  const all = bins.reduce((sum, bin) => sum + bin.num_rows, 0);
  return bins.map(({ low }, place) => {
    const above = bins.slice(place);
    const rows = above.reduce((sum, bin) => sum + bin.num_rows, 0);
    const right = above.reduce((sum, bin) => sum + bin.num_rows * bin.accuracy, 0);
    const least = place ? String(low) : "0";
    return [
      least,
      `${percent(Number(least))}: answers ${rows} of ${plural(all, "held-out row")}, ${percent(right / rows)} of them right`,
    ];
  });
}

/** @param {{reports: Record<string, QuestionReport>}} props by the questions' names */
export const Trust = ({ reports }) =>
  Object.entries(reports).map(([name, report]) => html`<${TrustIn} key=${name} name=${name} report=${report} />`);

/** @param {{name: string, report: QuestionReport}} props */
function TrustIn({ name, report: { summary, reliability = [], confusion } }) {
  const x = useMemo(() => reliability.map((bin) => Math.round(1000 * bin.confidence) / 10), [reliability]);
  const series = useMemo(
    () =>
      /** @type {import("./plot.js").Series[]} */ ([
        { label: "right, %", tone: "first", values: reliability.map((bin) => 100 * bin.accuracy) },
        { label: "ideal", tone: "third", values: x, isDashed: true },
      ]),
    [reliability, x],
  );
  return html`<section aria-label="Decisions: ${name}">
    <h3>Decisions: ${name}</h3>
    <p>${summary}</p>
    ${x.length > 1 ? html`<${Chart} title="Right answers by confidence" x=${x} xLabel="confidence, %" series=${series} />` : null}
    ${confusion ? html`<${Matrix} name=${name} confusion=${confusion} />` : null}
  </section>`;
}

/** @param {{name: string, confusion: {options: string[], counts: number[][]}}} props */
function Matrix({ name, confusion: { options, counts } }) {
  const names = counts.length > options.length ? [...options, "others"] : options;
  return html`<details>
    <summary>Which answers are confused</summary>
    <${Table} label="Answers to ${name}" columns=${["Right answer (rows), given answer (columns)", ...names.map((option) => `#${option}`)]}>
      ${counts.map(
        (row, place) =>
          html`<tr>
            <th scope="row">${names[place]}</th>
            ${row.map((number) => html`<td class="number">${number}</td>`)}
          </tr>`,
      )}
    <//>
  </details>`;
}

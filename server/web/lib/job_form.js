/** The form of a new job: its values, the request that they make, and the values that an earlier job had. */
import { perKey } from "./session.js";

/**
 * @typedef {{name: string, dataset: string, method: string, rank: number | null, alpha: number | null, epochs: number | null,
 *   learningRate: number | null, batchSize: number | null, validation: number | null, evalSteps: number | null,
 *   startFrom: string, publishIf: string, rest: Record<string, any>}} Fields `rest`: settings of an earlier job that
 *   have no field, as in a request
 */

/** @type {Fields} */
export const BLANK = {
  name: "",
  dataset: "",
  method: "lora",
  rank: null,
  alpha: null,
  epochs: null,
  learningRate: null,
  batchSize: null,
  validation: null,
  evalSteps: null,
  startFrom: "",
  publishIf: "always",
  rest: {},
};

/** The form's values, kept while other views are open. */
export const filled = perKey(BLANK);

/** The body of POST /train; missing fields have the server's defaults. @param {Fields} form */
export function bodyOf(form) {
  const { lora, training, ...rest } = form.rest;
  const shape = given({ ...lora, rank: form.rank, alpha: form.alpha });
  return given({
    ...rest,
    name: form.name,
    dataset: form.dataset,
    method: form.method,
    publish_if: form.publishIf,
    validation: form.validation ?? rest.validation,
    start_from: form.startFrom,
    // full fine-tuning has no shape, and start_from keeps its own
    lora: form.method === "full" ? null : form.startFrom ? given({ dropout: shape.dropout }) : shape,
    training: given({
      ...training,
      epochs: form.epochs,
      learning_rate: form.learningRate,
      batch_size: form.batchSize,
      eval_steps: form.evalSteps,
    }),
  });
}

/**
 * Settings that the form keeps in `rest`: their part of the request, name, label, hint and placeholder. Those with
 * `choices` have no other values.
 * @type {{part: "" | "lora" | "training", name: string, label: string, hint?: string, empty?: string, isText?: boolean,
 *   choices?: string[]}[]}
 */
export const FURTHER = [
  {
    part: "training",
    name: "early_stopping_patience",
    label: "Early stopping",
    hint: "evaluations without a gain",
  },
  { part: "training", name: "max_steps", label: "Steps", hint: "instead of epochs" },
  { part: "training", name: "seed", label: "Seed", empty: "0" },
  { part: "training", name: "schedule", label: "Schedule", choices: ["cosine", "linear", "constant"] },
  { part: "training", name: "warmup_ratio", label: "Warm-up", hint: "share of the steps", empty: "0.05" },
  { part: "training", name: "weight_decay", label: "Weight decay", empty: "0" },
  { part: "training", name: "max_length", label: "Max tokens of a row", empty: "512" },
  {
    part: "training",
    name: "overlong",
    label: "Longer rows",
    choices: ["auto", "truncate", "split", "drop", "refuse"],
  },
  { part: "lora", name: "dropout", label: "Dropout", empty: "0" },
  {
    part: "lora",
    name: "target_modules",
    label: "Modules",
    hint: "such as q_proj, v_proj",
    empty: "all-linear",
    isText: true,
  },
  { part: "", name: "test", label: "Test share", hint: "rows measured only at the end", empty: "0" },
  { part: "", name: "alias", label: "Alias", hint: "such as prod", isText: true },
  { part: "", name: "description", label: "Description", isText: true },
];

/** The value of a further setting. @param {Fields} form @param {(typeof FURTHER)[0]} setting */
export const furtherOf = ({ rest }, { part, name }) => (part ? rest[part] : rest)?.[name] ?? null;

/** `rest` with a further setting. @param {Fields} form @param {(typeof FURTHER)[0]} setting @param {any} value */
export function withFurther({ rest }, { part, name }, value) {
  const inner = given({ ...(part ? rest[part] : rest), [name]: value });
  if (!part) return inner;
  return given({ ...rest, [part]: Object.keys(inner).length ? inner : null });
}

/** What an earlier job had that no field shows. @param {Fields} form @returns {Record<string, any>} */
export const unshownOf = (form) =>
  FURTHER.filter(({ name }) => name !== "test" || typeof form.rest["test"] === "number") // rows or a data set
    .reduce((rest, setting) => withFurther({ ...form, rest }, setting, null), form.rest);

/** The form's values for a request, as somebody wrote it. @param {Record<string, any>} body @returns {Fields} */
export function fieldsOf(body) {
  const form = formOf(body);
  return { ...form, rest: given({ ...form.rest, alias: body["alias"] }) };
}

/**
 * The form's values for training again as an earlier job did. An alias is left out: it means that job's version. So is
 * what a job's config has and no request may have: `start_from_digest`, `init_std` and `auto_epochs`.
 * @param {Job["config"]} config
 * @returns {Fields}
 */
export function formOf(config) {
  const {
    name,
    dataset,
    validation,
    method,
    lora,
    training,
    start_from,
    start_from_digest,
    publish_if,
    test,
    alias,
    ...rest
  } = config;
  const { rank = null, alpha = null, init_std, ...shape } = lora ?? {};
  const {
    epochs,
    auto_epochs,
    learning_rate = null,
    batch_size = null,
    eval_steps = null,
    ...loop
  } = training ?? {};
  const isShare = typeof validation === "number";
  return {
    name: name ?? "",
    dataset: dataset ?? "",
    method: method ?? BLANK.method,
    rank,
    alpha,
    epochs: auto_epochs ? null : (epochs ?? null), // else the number that the job chose
    learningRate: learning_rate,
    batchSize: batch_size,
    validation: isShare ? validation : null,
    evalSteps: eval_steps,
    startFrom: start_from ?? "",
    publishIf: publish_if ?? BLANK.publishIf,
    rest: given({
      ...rest,
      validation: isShare || validation === "rows" ? null : validation, // rows of the request aren't kept
      test: test === 0 || test === "rows" ? null : test,
      lora: given(shape),
      training: given(loop),
    }),
  };
}

/** The entries that have a value. @param {Record<string, any>} values @returns {Record<string, any>} */
const given = (values) =>
  Object.fromEntries(
    Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== ""),
  );

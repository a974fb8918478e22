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

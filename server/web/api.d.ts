/** Answers of the API, generated from its OpenAPI document by tests/web/api_types.py. */

interface DatasetAnswer {
  id: string;
  /** the first upload's name, or null if it isn't known */
  filename: string | null;
  format: "jsonl" | "csv";
  rows: number;
  /** size of the first upload; quotas count the size of its rows as JSON */
  bytes: number;
  /** number of rows by kind: completion, messages, text */
  kinds: Record<string, number>;
  digest: string;
  created_at: string;
}

interface DatasetRow {
  /** number in the data set, from 0 */
  index: number;
  row: Record<string, any>;
  /** of its texts, without a chat template's */
  tokens: number;
  /** where a job puts it */
  split: "train" | "validation";
  /** how many rows are equal, this one included */
  copies: number;
}

interface DatasetRows {
  rows: DatasetRow[];
  /** rows that match `q`; without it, all rows */
  count: number;
  /** rows of the data set that equal an earlier one */
  duplicates: number;
}

interface DryRunAnswer {
  dry_run: true;
  name: string;
  data: RowCounts;
  /** optimizer steps in total */
  steps: number;
  estimate: Estimate;
  preview: PreviewRow[];
  /** some short rows with an answer, held-out rows first */
  samples: SampleRow[];
  config: Record<string, any>;
  /** completions are short (a median of at most 16 tokens), and at least 90% are distinct: held-out rows may be independent facts, which can't be known */
  facts: boolean;
  /** the other trainers' format of the rows, or null */
  mapping: "alpaca" | "sharegpt" | "trl" | null;
  /** about start_from and the rows; a job has them as events, except the one about facts */
  warnings: string[];
}

interface Estimate {
  seconds: number;
  tokens_per_second: number;
  /** the source of the speed */
  basis: "an earlier job" | "a matrix product";
}

interface EventAnswer {
  seq: number;
  at: string;
  level: "info" | "warning" | "error";
  type: "message" | "metrics";
  message: string;
  data: EventData;
}

interface EventData {
  /** left out if the event is about no step */
  step?: number | null;
  /** up to three, at evaluations and at the end of a training; left out of other events, and once the job's files are removed */
  samples?: EventSample[] | null;
  [name: string]: any;
}

interface EventSample {
  /** of a chat, its last turn before the answer */
  prompt: string;
  /** the row's own answer */
  wanted: string;
  /** of the unchanged base */
  base: string | null;
  /** of the weights after the step */
  tuned: string | null;
}

interface JobAnswer {
  id: string;
  /** the owner; names in the answer are this project's */
  project: string;
  /** id of the key that submitted the job; null if it needed none */
  key: string | null;
  kind: "train" | "merge" | "evaluate";
  name: string;
  status: "queued" | "running" | "paused" | "succeeded" | "failed" | "cancelled";
  /** place of a queued job in the order of turns, from 1: it counts its project's older queued jobs, and other projects' jobs that come first, running ones included; null unless it is queued */
  position: number | null;
  /** a pause was requested, and the job is still running */
  pausing: boolean;
  progress: Progress;
  metrics: JobMetrics;
  adapter: PublishedAdapter | null;
  error: string | null;
  created_at: string;
  started_at: string | null;
  finished_at: string | null;
  /** when the job's files were removed, or null; its rows are removed as soon as it ends */
  files_removed_at: string | null;
  /** the body with every default filled in */
  config: Record<string, any>;
  /** null unless the job trains */
  data: RowCounts | null;
  /** how many times a worker has started the job */
  attempt: number;
}

interface JobMetrics {
  /** of the last step, in nats per trained token */
  train_loss: number | null;
  /** on the held-out rows */
  eval_loss: number | null;
  /** of the unchanged base, on the same rows */
  base_eval_loss: number | null;
  [name: string]: any;
}

interface KeyAnswer {
  id: string;
  name: string;
  project: string;
  scopes: ("generate" | "train" | "metrics" | "manage" | "admin")[];
  expires_at: string | null;
  requests_per_minute: number | null;
  tokens_per_minute: number | null;
  max_jobs: number | null;
  max_bytes: number | null;
  max_versions: number | null;
  max_job_seconds: number | null;
  allow_full: boolean | null;
  created_at: string;
  revoked_at: string | null;
  last_used_at: string | null;
}

interface OwnKeyAnswer {
  id: string;
  name: string;
  project: string;
  scopes: ("generate" | "train" | "metrics" | "manage" | "admin")[];
  expires_at: string | null;
  requests_per_minute: number | null;
  tokens_per_minute: number | null;
  max_jobs: number | null;
  max_bytes: number | null;
  max_versions: number | null;
  max_job_seconds: number | null;
  allow_full: boolean | null;
}

interface PreviewRow {
  /** number among the training rows, from 0 */
  row: number;
  tokens: PreviewToken[];
  /** number of further tokens, which aren't shown */
  more: number;
}

interface PreviewToken {
  text: string;
  trained: boolean;
}

interface Progress {
  step: number;
  total_steps: number;
  epoch: number;
  /** non-padding inputs of training steps so far */
  tokens: number;
  tokens_per_second: number | null;
  eta_seconds: number | null;
}

interface ProjectAnswer {
  name: string;
  created_at: string;
  requests_per_minute: number | null;
  tokens_per_minute: number | null;
  max_jobs: number | null;
  max_bytes: number | null;
  max_versions: number | null;
  max_job_seconds: number | null;
  allow_full: boolean | null;
}

interface PublishedAdapter {
  name: string;
  version: number;
  digest: string;
  /** whether `latest` moved to it: not if it is worse; null for a job of an older release */
  moves_latest?: boolean | null;
}

interface RowCounts {
  digest: string;
  rows: number;
  tokens: number;
  trained_tokens: number;
  truncated: number;
  validation_digest: string | null;
  validation_rows: number;
  validation_truncated: number;
  /** held-out rows that are also training rows */
  overlap: number;
  test_digest?: string | null;
  test_rows?: number;
  /** test rows that are also training or held-out rows */
  test_overlap?: number;
  /** rows split into windows that count as rows */
  split?: number;
  /** rows too long for max_length */
  dropped?: number;
  /** of dropped and truncated rows */
  lost_tokens?: number;
  /** number of training rows by kind: completion, messages, text */
  kinds?: Record<string, number>;
}

interface SampleRow {
  held_out: boolean;
  /** left out for rows of messages */
  prompt?: string | null;
  /** the turns before the answer */
  messages?: SampleTurn[] | null;
  /** the row's own answer */
  completion: string;
}

interface SampleTurn {
  role: string;
  content: string;
}

/** What the API answers, as far as the page reads it; /docs has all of it. */

interface Part {
  name: string;
  version: number;
  digest: string;
  weight: number;
}

/** Numbers of rows. */
type Kinds = { completion?: number; messages?: number; text?: number; decision?: number };

type Verdict = "better" | "worse" | "can't tell";

interface Version {
  name: string;
  version: number;
  kind: "adapter" | "composition";
  digest: string;
  parts: Part[] | null;
  rank: number;
  alpha: number | null;
  target_modules: string[];
  parameters: number;
  bytes: number;
  base_model: string | null;
  metrics: Record<string, number>;
  verdict?: Verdict | null;
  config: {
    kinds?: Kinds;
    decisions?: object;
    evaluation?: { id: string; results: { metric: string; value: number; n: number; dataset: string }[] };
  };
  parent: string | null;
  job_id: string | null;
  created_at: string;
  resident: boolean;
  warnings: string[];
}

interface Adapter {
  name: string;
  kind: "adapter" | "composition";
  latest: number;
  visibility: "public" | "private";
  aliases: Record<string, number>;
  parts: Part[] | null;
  versions: Version[];
  next?: number;
  resident: boolean;
}

interface DataSet {
  id: string;
  filename: string | null;
  rows: number;
  bytes: number;
  kinds: Record<string, number>;
  created_at: string;
  warnings: string[];
}

type JobStatus = "queued" | "running" | "paused" | "succeeded" | "failed" | "cancelled";

interface Job {
  id: string;
  project: string;
  kind: string;
  name: string;
  status: JobStatus;
  position: number | null;
  pausing: boolean;
  progress: {
    step: number;
    total_steps: number | null;
    epoch: number;
    tokens: number;
    tokens_per_second: number | null;
    eta_seconds: number | null;
  };
  metrics: Record<string, number | null>;
  adapter: { name: string; version: number; digest: string } | null;
  error: string | null;
  created_at: string;
  started_at: string | null;
  finished_at: string | null;
  files_removed_at: string | null;
  config: {
    name?: string;
    dataset?: string | null;
    validation?: number | string | null;
    method?: string;
    lora?: Record<string, any>;
    training?: Record<string, any>;
    start_from?: string | null;
    start_from_digest?: string | null;
    publish_if?: string;
    alias?: string | null;
  };
  data: RowCounts | null;
}

interface RowCounts {
  digest: string;
  rows: number;
  tokens: number;
  trained_tokens: number;
  truncated: number;
  validation_digest: string | null;
  validation_rows: number;
  kinds?: Kinds;
}

interface JobEvent {
  seq: number;
  at: string;
  level: string;
  type: "message" | "metrics";
  message: string;
  data: Record<string, number>;
}

interface Sample {
  held_out: boolean;
  prompt?: string;
  messages?: { role: string; content: string }[];
  completion: string;
}

interface DryRun {
  data: RowCounts;
  steps: number;
  estimate: { seconds: number; tokens_per_second: number };
  preview: { row: number; tokens: { text: string; trained: boolean }[]; more: number }[];
  samples: Sample[];
  warnings: string[];
}

interface ScoredToken {
  token: string;
  bytes: number[];
  logprob: number;
  top?: ScoredToken[];
}

interface Key extends Partial<Limits> {
  id: string;
  name: string;
  project: string;
  scopes: string[];
  created_at: string;
  expires_at: string | null;
  revoked_at: string | null;
  last_used_at: string | null;
}

interface Limits {
  requests_per_minute: number | null;
  tokens_per_minute: number | null;
  max_jobs: number | null;
  max_bytes: number | null;
  max_versions: number | null;
  max_job_seconds: number | null;
}

interface Project extends Limits {
  name: string;
}

interface UsageRow {
  project?: string | null;
  key?: string | null;
  adapter?: string | null;
  day?: string | null;
  requests: number;
  prompt_tokens: number;
  cached_tokens: number;
  completion_tokens: number;
  trained_tokens: number;
  job_seconds: number;
}

interface AuditEntry {
  number: number;
  at: string;
  who: string;
  action: string;
  project: string;
  target: string;
  detail: Record<string, unknown>;
  address: string | null;
  request_id: string | null;
}

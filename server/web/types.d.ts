/** What the API answers, as far as the page reads it; /docs has all of it. `api.d.ts` is generated. */

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

type DataSet = DatasetAnswer;
type DryRun = DryRunAnswer;
type Job = JobAnswer;
type JobEvent = EventAnswer;
type JobStatus = Job["status"];
type Key = KeyAnswer;
type Project = ProjectAnswer;
type Sample = SampleRow;

interface ScoredToken {
  token: string;
  bytes: number[];
  logprob: number;
  top?: ScoredToken[];
}

interface Limits {
  requests_per_minute: number | null;
  tokens_per_minute: number | null;
  max_jobs: number | null;
  max_bytes: number | null;
  max_versions: number | null;
  max_job_seconds: number | null;
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

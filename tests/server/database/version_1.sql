BEGIN TRANSACTION;
CREATE TABLE access_changes (
	id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "access_changes" VALUES(1,1);
CREATE TABLE adapter_aliases (
	name VARCHAR(129) NOT NULL, 
	alias VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	PRIMARY KEY (name, alias), 
	FOREIGN KEY(name, version) REFERENCES adapter_versions (name, version)
);
INSERT INTO "adapter_aliases" VALUES('tweets','prod',1);
CREATE TABLE adapter_versions (
	name VARCHAR(129) NOT NULL, 
	version INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	rank INTEGER NOT NULL, 
	alpha FLOAT NOT NULL, 
	target_modules JSON NOT NULL, 
	parameters BIGINT NOT NULL, 
	bytes BIGINT NOT NULL, 
	base_model TEXT, 
	metrics JSON NOT NULL, 
	parent TEXT, 
	job_id VARCHAR(64), 
	warnings JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	base_digest VARCHAR(64), 
	data_digest VARCHAR(64), 
	config JSON DEFAULT '{}' NOT NULL, 
	key_id VARCHAR(64), 
	PRIMARY KEY (name, version), 
	FOREIGN KEY(name) REFERENCES adapters (name)
);
INSERT INTO "adapter_versions" VALUES('tweets',1,'0000000000000000000000000000000000000000000000000000000000000001',4,8.0,'["q_proj"]',10,100,'smollm2-135m-instruct','{"loss": 0.5}',NULL,NULL,'[]','2026-11-30 20:06:45.387397',NULL,NULL,'{}',NULL);
INSERT INTO "adapter_versions" VALUES('poems',1,'0000000000000000000000000000000000000000000000000000000000000002',4,8.0,'["q_proj"]',10,100,'smollm2-135m-instruct','{"loss": 0.5}',NULL,NULL,'[]','2026-11-30 20:06:45.389718',NULL,NULL,'{}',NULL);
INSERT INTO "adapter_versions" VALUES('mix',1,'0f9190c2b83592cd47318a9a91765b1994bac01f534e05a66a5618746748c595',8,0.0,'["q_proj"]',20,0,'smollm2-135m-instruct','{}','tweets@1*0.5+poems@1*0.5',NULL,'[]','2026-11-30 20:06:45.395572',NULL,NULL,'{}',NULL);
CREATE TABLE adapters (
	name VARCHAR(129) NOT NULL, 
	project VARCHAR(64) DEFAULT 'default' NOT NULL, 
	is_public BOOLEAN DEFAULT 0 NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	latest INTEGER, 
	rolled_back BOOLEAN DEFAULT 0 NOT NULL, 
	next_version INTEGER NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "adapters" VALUES('tweets','default',0,'adapter',1,0,2);
INSERT INTO "adapters" VALUES('poems','default',0,'adapter',1,0,2);
INSERT INTO "adapters" VALUES('mix','default',0,'composition',1,0,2);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE api_keys (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	project VARCHAR(64) NOT NULL, 
	scopes JSON NOT NULL, 
	secret_digest VARCHAR(64) NOT NULL, 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME, 
	revoked_at DATETIME, 
	last_used_at DATETIME, 
	requests_per_minute BIGINT, 
	tokens_per_minute BIGINT, 
	max_jobs BIGINT, 
	max_bytes BIGINT, 
	PRIMARY KEY (id), 
	UNIQUE (secret_digest)
);
INSERT INTO "api_keys" VALUES('key-21d6a1651f0e572c','laptop','default','["generate", "train"]','51005c07e21bb84239e9369506c0a4493b472805a4b16b8380b6aab5d821aa16','2026-11-30 20:06:45.429342',NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE audit (
	number INTEGER NOT NULL, 
	at DATETIME NOT NULL, 
	who VARCHAR(64) NOT NULL, 
	action VARCHAR(64) NOT NULL, 
	project VARCHAR(64) NOT NULL, 
	target TEXT NOT NULL, 
	detail JSON NOT NULL, 
	PRIMARY KEY (number)
);
INSERT INTO "audit" VALUES(1,'2026-11-30 20:06:45.431299','test','key.create','default','key-21d6a1651f0e572c','{"name": "laptop", "scopes": ["generate", "train"]}');
CREATE TABLE bytes_place (
	id INTEGER NOT NULL, 
	place VARCHAR(64) NOT NULL, 
	url TEXT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE composition_parts (
	name VARCHAR(129) NOT NULL, 
	version INTEGER NOT NULL, 
	place INTEGER NOT NULL, 
	part_name VARCHAR(129) NOT NULL, 
	part_version INTEGER NOT NULL, 
	part_digest VARCHAR(64) NOT NULL, 
	weight FLOAT NOT NULL, 
	PRIMARY KEY (name, version, place), 
	FOREIGN KEY(name, version) REFERENCES adapter_versions (name, version), 
	FOREIGN KEY(part_name, part_version) REFERENCES adapter_versions (name, version)
);
INSERT INTO "composition_parts" VALUES('mix',1,0,'tweets',1,'0000000000000000000000000000000000000000000000000000000000000001',0.5);
INSERT INTO "composition_parts" VALUES('mix',1,1,'poems',1,'0000000000000000000000000000000000000000000000000000000000000002',0.5);
CREATE TABLE job_events (
	job_id VARCHAR(64) NOT NULL, 
	seq INTEGER NOT NULL, 
	at DATETIME NOT NULL, 
	level VARCHAR(16) NOT NULL, 
	type VARCHAR(16) NOT NULL, 
	message TEXT NOT NULL, 
	data JSON NOT NULL, 
	PRIMARY KEY (job_id, seq), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "job_events" VALUES('job-1',1,'2026-11-30 20:06:45.400000','info','message','queued','{}');
INSERT INTO "job_events" VALUES('job-2',1,'2026-11-30 20:06:45.410000','info','message','queued','{}');
INSERT INTO "job_events" VALUES('job-1',2,'2026-11-30 20:06:45.424000','info','message','started','{}');
INSERT INTO "job_events" VALUES('job-1',3,'2026-11-30 20:06:45.428000','error','message','no rows','{}');
CREATE TABLE job_uses (
	job_id VARCHAR(64) NOT NULL, 
	used VARCHAR(255) NOT NULL, 
	PRIMARY KEY (job_id, used), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "job_uses" VALUES('job-1','ds-1');
INSERT INTO "job_uses" VALUES('job-2','ds-1');
CREATE TABLE jobs (
	number INTEGER NOT NULL, 
	id VARCHAR(64) NOT NULL, 
	project VARCHAR(64) DEFAULT 'default' NOT NULL, 
	key_id VARCHAR(64), 
	name VARCHAR(64) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	spec JSON NOT NULL, 
	data JSON NOT NULL, 
	progress JSON NOT NULL, 
	metrics JSON NOT NULL, 
	adapter JSON, 
	report JSON, 
	error TEXT, 
	created_at DATETIME NOT NULL, 
	started_at DATETIME, 
	finished_at DATETIME, 
	idempotency_key VARCHAR(320), 
	body_digest VARCHAR(64), 
	owner VARCHAR(255), 
	token INTEGER NOT NULL, 
	lease_until FLOAT NOT NULL, 
	timed_at FLOAT, 
	run_seconds FLOAT DEFAULT '0' NOT NULL, 
	project_seconds FLOAT, 
	wants_pause BOOLEAN NOT NULL, 
	gives_way BOOLEAN DEFAULT 0 NOT NULL, 
	stalled_attempts INTEGER NOT NULL, 
	crash TEXT, 
	checkpoint_step INTEGER NOT NULL, 
	metrics_step INTEGER NOT NULL, 
	num_events INTEGER NOT NULL, 
	files_removed_at DATETIME, 
	PRIMARY KEY (number), 
	UNIQUE (id), 
	UNIQUE (idempotency_key)
);
INSERT INTO "jobs" VALUES(1,'job-1','default',NULL,'tweets','failed','{"name": "tweets", "method": "lora", "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "init": "gaussian", "use_rslora": false}, "training": {"epochs": 3, "max_steps": null, "learning_rate": 0.001, "batch_size": 8, "max_length": 512, "schedule": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0, "eval_steps": null, "checkpoint_steps": null, "early_stopping_patience": null, "packing": true, "overlong": "truncate"}, "start_from": null, "start_from_digest": null, "publish_if": "always", "alias": null, "description": ""}','{"num_rows": 3}','{}','{}',NULL,NULL,'no rows','2026-11-30 20:06:45.399000','2026-11-30 20:06:45.423000','2026-11-30 20:06:45.426000',NULL,'','w',1,1.79606921542300033e+09,1.79606920542601799e+09,3.01766395568847656e-03,1.00301766395568847e+00,0,0,1,NULL,-1,-1,3,NULL);
INSERT INTO "jobs" VALUES(2,'job-2','default',NULL,'tweets','queued','{"name": "tweets", "method": "lora", "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "init": "gaussian", "use_rslora": false}, "training": {"epochs": 3, "max_steps": null, "learning_rate": 0.001, "batch_size": 8, "max_length": 512, "schedule": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0, "eval_steps": null, "checkpoint_steps": null, "early_stopping_patience": null, "packing": true, "overlong": "truncate"}, "start_from": null, "start_from_digest": null, "publish_if": "always", "alias": null, "description": ""}','{"num_rows": 3}','{}','{}',NULL,NULL,NULL,'2026-11-30 20:06:45.409000',NULL,NULL,NULL,'',NULL,0,0.0,NULL,0.0,NULL,0,0,0,NULL,-1,-1,1,NULL);
CREATE TABLE projects (
	name VARCHAR(64) NOT NULL, 
	created_at DATETIME NOT NULL, 
	requests_per_minute BIGINT, 
	tokens_per_minute BIGINT, 
	max_jobs BIGINT, 
	max_bytes BIGINT, 
	PRIMARY KEY (name)
);
INSERT INTO "projects" VALUES('default','2026-11-30 20:06:45.430312',NULL,NULL,NULL,NULL);
CREATE TABLE usage (
	day DATE NOT NULL, 
	project VARCHAR(64) NOT NULL, 
	key_id VARCHAR(64) NOT NULL, 
	adapter TEXT NOT NULL, 
	requests BIGINT NOT NULL, 
	prompt_tokens BIGINT NOT NULL, 
	cached_tokens BIGINT NOT NULL, 
	completion_tokens BIGINT NOT NULL, 
	trained_tokens BIGINT NOT NULL, 
	job_seconds FLOAT NOT NULL, 
	PRIMARY KEY (day, project, key_id, adapter)
);
INSERT INTO "usage" VALUES('2026-11-30','default','anonymous','tweets',0,0,0,0,0,3.01766395568847656e-03);
INSERT INTO "usage" VALUES('2026-11-30','default','anonymous','base',1,2,0,0,0,0.0);
CREATE INDEX ix_adapters_project_name ON adapters (project, name);
CREATE INDEX ix_adapter_versions_digest ON adapter_versions (digest);
CREATE INDEX ix_composition_parts_part ON composition_parts (part_name, part_version);
CREATE INDEX ix_jobs_status_number ON jobs (status, number);
CREATE INDEX ix_jobs_project_number ON jobs (project, number);
CREATE INDEX ix_jobs_project_seconds ON jobs (project, project_seconds);
CREATE INDEX ix_jobs_seconds ON jobs (project_seconds);
CREATE INDEX ix_job_uses_used ON job_uses (used);
COMMIT;

"""/v1/fine_tuning/jobs and /v1/files: jobs of /train in OpenAI's form."""

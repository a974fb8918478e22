"""Spans of a real server and a real training job, received over the wire in OTLP."""

import json
from pathlib import Path

import pytest

from server.jobs.files import LOG_NAME
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import code_rows, submit, succeeded
from tests.kits.otlp_receiver import receiving

TRACE = "0af7651916cd43dd8448eb211c80319c"
SECRET = "xyzzy"


@pytest.mark.thorough  # a request's spans: server/api/test_request_spans.py
def test_spans_arrive(converted_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's spans, then those of a request that loads the new adapter; none contains text."""
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        server = ServerProcess(tmp_path, model=converted_tiny, workers=1, log_format="json")
        try:
            rows = [*code_rows(12), {"prompt": SECRET, "completion": SECRET}]
            training = {"max_steps": 6, "eval_steps": 3}
            job_id = submit(server, name="codes", data=rows, validation=rows[:3], training=training)
            succeeded(server, job_id)
            server.client.headers["traceparent"] = f"00-{TRACE}-b7ad6b7169203331-01"
            answer = server.generate(f"{SECRET} 404:", adapter="codes", max_tokens=12, ignore_eos=True)
            server.terminate()
            assert server.exit_code() == 0
        finally:
            server.close()
    assert {span.resource["service.name"] for span in receiver.spans} == {"smolora"}

    (submission,) = receiver.named("POST /train")
    (job,) = receiver.named("train codes")
    assert submission.attributes["smolora.job.id"] == job.attributes["smolora.job.id"] == job_id
    assert job.links == (submission.trace,)
    assert job.trace != submission.trace
    assert receiver.children(job) == ["load base", "steps", "steps", "finish"]
    steps = [span.attributes for span in receiver.named("steps")]
    assert [(step["smolora.step.first"], step["smolora.step.last"]) for step in steps] == [(1, 3), (4, 6)]

    (request,) = receiver.named("POST /generate")
    (generation,) = receiver.named("text_completion codes@1")
    assert request.trace == TRACE
    assert request.above == "b7ad6b7169203331"
    assert receiver.children(request) == [generation.name]
    assert generation.attributes["gen_ai.response.id"] == answer["id"]
    assert generation.attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert generation.attributes["gen_ai.usage.output_tokens"] == 12
    assert receiver.children(generation) == ["queue", "prefill", "decode"]
    (queue,) = receiver.named("queue")
    (load,) = receiver.named("load adapters")
    (prefill,) = receiver.named("prefill")
    (decode,) = receiver.named("decode")
    assert load.above == queue.id
    moments = [generation.start, queue.start, load.start, load.end, queue.end, prefill.end, decode.end]
    assert moments == sorted(moments)
    assert (queue.end, prefill.end) == (prefill.start, decode.start)
    assert decode.end <= request.end
    assert abs((decode.end - queue.start) / 1e9 - answer["timing"]["total_ms"] / 1e3) < 0.05

    assert not [body for body in receiver.bodies if SECRET.encode() in body]
    assert SECRET not in server.log()
    lines = [json.loads(line) for line in server.log().splitlines()]  # each line is JSON, also the worker's
    assert {"smolora.run", "smolora.api", "smolora.worker"} <= {line["logger"] for line in lines}
    (line,) = [line for line in lines if line.get("path") == "/generate"]
    assert (line["trace"], line["generation"], line["adapters"]) == (TRACE, answer["id"], "codes@1")
    jobs_log = (tmp_path / "jobs" / job_id / LOG_NAME).read_text()
    assert {json.loads(line)["job"] for line in jobs_log.splitlines()} <= {job_id}
    assert SECRET not in jobs_log

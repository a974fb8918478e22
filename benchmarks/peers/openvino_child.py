"""OpenVINO GenAI's end of the pipe, run by the interpreter of its own environment, which has few packages.

Each line is a JSON document: first the settings, then batches, each answered by one line. Tokenizing and
detokenizing are timed, as for our server.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol, cast

import openvino_genai

from benchmarks.allocation import keeps_freed_memory
from server.system.memory import keep_freed_memory

CACHE_GIGABYTES = 2


class _Output(Protocol):
    generated_ids: Sequence[int]


class _Handle(Protocol):
    def can_read(self) -> bool: ...
    def read(self) -> Mapping[int, _Output]: ...


class _Tokenizer(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class _Pipeline(Protocol):
    def add_request(self, request_id: int, prompt: str, config: object) -> _Handle: ...
    def has_non_finished_requests(self) -> bool: ...
    def step(self) -> None: ...
    def generate(self, prompts: Sequence[str], configs: Sequence[object]) -> object: ...
    def get_tokenizer(self) -> _Tokenizer: ...


class Child:
    """Two pipelines: one without adapters, and one with adapters, built on first use, which has another graph."""

    def __init__(self, settings: Mapping[str, object]) -> None:
        self._settings = settings
        self._plain = self._made(None)
        self._adapters: dict[str, object] = {}
        self._adapted: _Pipeline | None = None
        self._last_parts: object = None

    def _made(self, adapters: object) -> _Pipeline:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIGABYTES
        scheduler.max_num_seqs = self._settings["sequences"]
        scheduler.max_num_batched_tokens = self._settings["step_tokens"]  # over prompts and sequences
        scheduler.dynamic_split_fuse = True  # splits prompts into chunks, batched with running sequences
        scheduler.enable_prefix_caching = False  # no prompt is repeated
        properties: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._settings["precision"],
            "INFERENCE_NUM_THREADS": self._settings["threads"],
            "KV_CACHE_PRECISION": self._settings["cache"],
        }
        if adapters is not None:
            properties["adapters"] = adapters
        model = self._settings["model"]
        return cast(_Pipeline, openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties))

    def _pipeline_for(self, parts: Sequence[tuple[str, float]]) -> _Pipeline:
        """Return the pipeline for these adapters, ready for requests."""
        if not parts:
            return self._plain
        if self._adapted is None:
            files = cast("Mapping[str, str]", self._settings["adapters"])
            self._adapters = {name: openvino_genai.Adapter(file) for name, file in files.items()}
            self._adapted = self._made(openvino_genai.AdapterConfig(list(self._adapters.values())))
        if parts != self._last_parts:
            # New requests use the adapters of the last call of `generate`.
            self._adapted.generate(["A"], [self._config(1, parts)])
            self._last_parts = parts
        return self._adapted

    def run(self, parts: Sequence[tuple[str, float]], streams: Sequence[Sequence[tuple[str, int]]]) -> object:
        """Run all streams concurrently, with the requests of each stream in sequence."""
        pipeline = self._pipeline_for(parts)
        queues = [list(requests) for requests in streams]
        tokens: list[list[list[int]]] = [[] for _ in streams]
        times: list[list[list[float]]] = [[] for _ in streams]
        handles: list[_Handle | None] = [None] * len(streams)
        started = time.perf_counter()
        number = 0
        while True:
            for stream, queue in enumerate(queues):
                if handles[stream] is None and queue:
                    prompt, max_tokens = queue.pop(0)
                    tokens[stream].append([])
                    times[stream].append([time.perf_counter()])
                    handles[stream] = pipeline.add_request(number, prompt, self._config(max_tokens, parts))
                    number += 1
            if not pipeline.has_non_finished_requests():
                break
            pipeline.step()
            now = time.perf_counter()
            for stream, handle in enumerate(handles):
                if handle is not None and handle.can_read():
                    (output,) = handle.read().values()
                    tokens[stream][-1] += output.generated_ids
                    times[stream][-1] += [now] * len(output.generated_ids)
                    wanted = streams[stream][len(tokens[stream]) - 1][1]
                    if len(tokens[stream][-1]) >= wanted:
                        handles[stream] = None
        decode = pipeline.get_tokenizer().decode
        texts = [decode(ids) for answers in tokens for ids in answers]
        seconds = time.perf_counter() - started
        answers = [answer for stream in times for answer in stream]
        return {
            "num_tokens": sum(len(answer) - 1 for answer in answers),
            "seconds": seconds,
            "first_token": [answer[1] - answer[0] for answer in answers],
            "gaps": [later - earlier for answer in answers for earlier, later in pairwise(answer[1:])],
            "texts": texts,
        }

    def _config(self, max_tokens: int, parts: Sequence[tuple[str, float]]) -> object:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        if parts:
            pairs = [(self._adapters[name], scale) for name, scale in parts]
            config.adapters = openvino_genai.AdapterConfig(pairs)
        return config


def main() -> None:
    """Answer until the pipe closes. The libraries' output goes to the log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    keep_freed_memory()
    child: Child | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if child is None:
            child = Child(command)
            answer: object = {"keeps_freed_memory": keeps_freed_memory()}
        else:
            answer = child.run([tuple(part) for part in command["adapters"]], command["streams"])
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

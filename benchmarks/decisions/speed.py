"""Measure decisions per second, next to transformers + PEFT and to generating the answers.

Each round measures all systems once, in turn, with new inputs. Our server answers over HTTP, one request for all
inputs or all questions. The peer computes in this process, from texts to probabilities.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.command import Say
from benchmarks.decisions.peer import Peer
from benchmarks.prompts import PromptSource
from benchmarks.serving.systems.server_process import Server
from server.client.client import Client
from server.decisions.prompts import DecisionEncoder, prompt_text
from server.decisions.questions import Question, parse_question

ADAPTER = "speed"
OURS, GENERATE = "/decide", "/generate, choice"
FURTHER_TARGET = 0.15
_OPTIONS = {
    "Which team should answer?": ("billing", "shipping", "sales", "support", "legal"),
    "How does the customer feel?": ("calm", "happy", "annoyed", "angry", "sad"),
    "How urgent is it?": ("now", "today", "this week", "this month", "never"),
    "What is wanted?": ("a refund", "a repair", "advice", "an invoice", "nothing"),
    "Which product is it about?": ("phone", "laptop", "watch", "camera", "none"),
    "Which channel suits the answer?": ("mail", "chat", "call", "letter", "visit"),
    "How long should the answer be?": ("a word", "a line", "a paragraph", "a page", "more"),
    "Who wrote it?": ("buyer", "seller", "courier", "staff", "stranger"),
    "Where does it come from?": ("Europe", "Asia", "Africa", "America", "Oceania"),
    "What went wrong first?": ("payment", "delivery", "quality", "login", "nothing"),
}
QUESTIONS = [
    parse_question({"type": "choice", "instructions": asked, "choices": [{"value": value} for value in values]})
    for asked, values in _OPTIONS.items()
]


@dataclass(frozen=True)
class Work:
    """A call: questions about each of several inputs of equally many tokens."""

    num_inputs: int
    num_questions: int
    input_tokens: int

    @property
    def num_decisions(self) -> int:
        return self.num_inputs * self.num_questions

    @property
    def title(self) -> str:
        inputs = "1 input" if self.num_inputs == 1 else f"{self.num_inputs} inputs"
        questions = "1 question" if self.num_questions == 1 else f"{self.num_questions} questions"
        return f"{inputs} of {self.input_tokens} tokens, {questions}"


NUM_QUESTIONS = len(QUESTIONS)
SHORT_CALLS = 5
LENGTHS = (128, 512)
"""Tokens of the input that is asked several questions."""
WORKS = (Work(32, 1, 128), *(Work(1, questions, tokens) for tokens in LENGTHS for questions in (1, NUM_QUESTIONS)))
QUICK_WORKS = (Work(2, 1, 16), Work(1, 1, 16), Work(1, NUM_QUESTIONS, 16))


@dataclass(frozen=True)
class Cost:
    """What one call took: wall time, and processor time of all threads of the system that computed it."""

    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Row:
    """The costs of a kind of call, by system and round."""

    work: Work
    costs: dict[str, tuple[Cost, ...]]


class Systems:
    """The server, with an adapter, and the peer with the same adapter in two types."""

    def __init__(self, server: Server, base: Path, adapter: Path, encoder: DecisionEncoder) -> None:
        server.upload(ADAPTER, adapter)
        self._client = Client(server.url)
        self._server = psutil.Process(server.pid)
        self._encoder = encoder
        self._pool = ThreadPoolExecutor(32)
        self.calls: dict[str, Callable[[Sequence[str], Sequence[Question]], object]] = {
            OURS: self.decide,
            GENERATE: self._generate,
        }
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            peer = Peer(base, adapter, dtype)
            self.calls[f"transformers + PEFT, {name}, whole rows"] = self._whole_rows(peer)
            self.calls[f"transformers + PEFT, {name}, prompts first"] = self._prompts_first(peer)

    def close(self) -> None:
        self._pool.shutdown()
        self._client.close()

    def cost(self, name: str, inputs: Sequence[str], questions: Sequence[Question]) -> Cost:
        """Return what the system's call takes."""
        call = self.calls[name]
        if name in (OURS, GENERATE):
            begun, before = time.perf_counter(), self._server_seconds()
            call(inputs, questions)
            return Cost(time.perf_counter() - begun, self._server_seconds() - before)
        begun, before = time.perf_counter(), time.process_time()
        call(inputs, questions)
        return Cost(time.perf_counter() - begun, time.process_time() - before)

    def decide(self, inputs: Sequence[str], questions: Sequence[Question]) -> list[list[float]]:
        """Return the probabilities of each question about each input, from /decide."""
        body = {
            "adapter": ADAPTER,
            "input": list(inputs),
            "questions": [question.document() for question in questions],
        }
        results: object = self._client.decide(body)["results"]
        assert isinstance(results, list)
        return [
            [float(one["probability"]) for one in answer["probabilities"]]
            for result in results
            for answer in result["answers"]
        ]

    def _server_seconds(self) -> float:
        times = self._server.cpu_times()
        return float(times.user + times.system)

    def _generate(self, inputs: Sequence[str], questions: Sequence[Question]) -> object:
        def one(text: str, question: Question) -> object:
            body = {
                "adapter": ADAPTER,
                "messages": [{"role": "user", "content": prompt_text(text, question)}],
                "structured_outputs": {"choice": [option.text for option in question.options]},
                "temperature": 0,
                "max_tokens": 16,
            }
            return self._client.generate(body)

        asked = [(text, question) for text in inputs for question in questions]
        return list(self._pool.map(lambda pair: one(*pair), asked))

    def _whole_rows(self, peer: Peer) -> Callable[[Sequence[str], Sequence[Question]], list[list[float]]]:
        def call(inputs: Sequence[str], questions: Sequence[Question]) -> list[list[float]]:
            prompts, options = self._encoded(inputs, questions)
            return _probabilities(peer.whole_rows(prompts, options))

        return call

    def _prompts_first(self, peer: Peer) -> Callable[[Sequence[str], Sequence[Question]], list[list[float]]]:
        def call(inputs: Sequence[str], questions: Sequence[Question]) -> list[list[float]]:
            prompts, options = self._encoded(inputs, questions)
            num_shared = _num_shared(prompts) if len(questions) > 1 else 0
            return _probabilities(peer.prompts_first(prompts, options, num_shared))

        return call

    def _encoded(
        self, inputs: Sequence[str], questions: Sequence[Question]
    ) -> tuple[list[tuple[int, ...]], list[Sequence[tuple[int, ...]]]]:
        asked = [(text, question) for text in inputs for question in questions]
        prompts = [self._encoder.prompt(text, question) for text, question in asked]
        return prompts, [self._encoder.options(question) for _, question in asked]


def measure(
    systems: Systems, prompts: PromptSource, works: Sequence[Work], rounds: int, say: Say
) -> tuple[Row, ...]:
    """Measure all works in all rounds. The figures of a single decision are means over `SHORT_CALLS` calls."""
    found: dict[Work, dict[str, list[Cost]]] = {work: {name: [] for name in systems.calls} for work in works}
    names = list(systems.calls)
    for name in names:  # compile grammars (few may wait), and run every kernel once
        for question in QUESTIONS:
            systems.cost(name, prompts.take(1, works[0].input_tokens), [question])
    for number in range(rounds):
        for index, work in enumerate(works):
            questions = QUESTIONS[: work.num_questions]
            calls = SHORT_CALLS if work.num_decisions == 1 else 1
            shift = (number + index) % len(names)
            for name in [*names[shift:], *names[:shift]]:
                costs = [
                    systems.cost(name, prompts.take(work.num_inputs, work.input_tokens), questions)
                    for _ in range(calls)
                ]
                mean = Cost(
                    sum(cost.seconds for cost in costs) / calls,
                    sum(cost.processor_seconds for cost in costs) / calls,
                )
                found[work][name].append(mean)
                speed = work.num_decisions / mean.seconds
                figures = f"{speed:.1f}/s, {mean.processor_seconds:.3f} processor seconds"
                say(f"round {number + 1}, {work.title}: {name}: {figures}")
    return tuple(
        Row(work, {name: tuple(costs) for name, costs in by_name.items()}) for work, by_name in found.items()
    )


def further_shares(rows: Sequence[Row], tokens: int, *, processor: bool = False) -> list[float]:
    """Return our cost of a further question about an input of this length, as a share of the first, by round."""

    def costs(num_questions: int) -> list[float]:
        (row,) = (row for row in rows if row.work == Work(1, num_questions, tokens))
        return [one.processor_seconds if processor else one.seconds for one in row.costs[OURS]]

    pairs = zip(costs(NUM_QUESTIONS), costs(1), strict=True)
    return [(many - one) / (NUM_QUESTIONS - 1) / one for many, one in pairs]


def _num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix. At least the last token of each prompt is left."""
    pairs = enumerate(zip(*prompts, strict=False))
    different = next((place for place, tokens in pairs if len(set(tokens)) > 1), min(map(len, prompts)))
    return min(different, min(map(len, prompts)) - 1)


def _probabilities(scores: list[list[float]]) -> list[list[float]]:
    return [torch.tensor(row, dtype=torch.float64).softmax(0).tolist() for row in scores]

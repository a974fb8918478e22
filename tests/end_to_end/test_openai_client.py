"""The official `openai` package, unchanged, on the real server."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import CompletionChoice
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from openai.types.shared_params.response_format_json_schema import JSONSchema
from pydantic import BaseModel, ConfigDict

from tests.end_to_end.conftest import MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_QUEUE
from tests.end_to_end.server_process import PATIENCE, ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.server.running import running

pytestmark = pytest.mark.real

PROMPT = "The capital of France is"
REFUSED = 'smolora_requests_total{outcome="refused"}'
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=PATIENCE, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(shared_server: ServerProcess) -> str:
    """Return the base's name."""
    return str(shared_server.client.get("/ready").json()["model"])


def chat_of(server: ServerProcess, **fields: object) -> str:
    """Return what /generate answers to the conversation, greedy."""
    system, user = "Answer in one short sentence.", "What is the capital of France?"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    answer = server.client.post("/generate", json={"messages": messages, "temperature": 0, **fields}).json()
    return str(answer["choices"][0]["text"])


def test_labels_change_no_answer(client: OpenAI, model: str) -> None:
    def asked(**labels: object) -> str:
        answer = client.chat.completions.with_raw_response.create(
            model=model, messages=MESSAGES, temperature=0, max_tokens=8, extra_body=labels
        )
        assert ("x-smolora-warning" in answer.headers) == bool(labels)
        return str(answer.parse().choices[0].message.content)

    assert asked(user="me", metadata={"a": "b"}, store=True, tool_choice="auto") == asked()


def test_base_url_without_v1_is_explained(server: ServerProcess) -> None:
    with OpenAI(base_url=server.url, api_key="any", max_retries=0) as lost:
        with pytest.raises(openai.NotFoundError, match="the client's base URL must end with /v1"):
            lost.chat.completions.create(model="base", messages=MESSAGES)
        with pytest.raises(openai.NotFoundError, match="the client's base URL must end with /v1"):
            lost.models.list()


def test_models(client: OpenAI, model: str) -> None:
    base, *others = client.models.list()
    assert (base.id, base.object, base.owned_by) == (model, "model", "smolora")
    assert {"left", "right"} <= {other.id for other in others}
    assert all(other.model_extra == {"parent": model} for other in others)
    assert client.models.retrieve("left@1*0.5+right").id == "left@1*0.5+right"
    with pytest.raises(openai.NotFoundError, match="left@99"):
        client.models.retrieve("left@99")


def test_chat(client: OpenAI, server: ServerProcess, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_completion_tokens=24
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", chat_of(server, max_tokens=24))
    assert choice.finish_reason == "stop"
    assert answer.model == model
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # The client's own form of the turn is sent back unchanged.
    turn = cast("ChatCompletionMessageParam", choice.message.model_dump())
    more: list[ChatCompletionMessageParam] = [*MESSAGES, turn, {"role": "user", "content": "And of Italy?"}]
    following = client.chat.completions.create(model=model, messages=more, max_tokens=1)
    assert following.usage is not None
    assert following.usage.prompt_tokens > answer.usage.total_tokens


def test_streamed_chat(client: OpenAI, server: ServerProcess, model: str) -> None:
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    first, *_, end, last = chunks
    assert first.choices[0].delta.role == "assistant"
    assert (end.choices[0].finish_reason, end.choices[0].delta.content) == ("stop", None)
    assert (last.choices, last.usage is not None) == ([], True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == chat_of(server, max_tokens=24)
    assert len(chunks) > 6  # it arrived in pieces


def test_client_assembles_a_stream(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=MESSAGES, temperature=0, max_tokens=24, n=2, logprobs=True, top_logprobs=2
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        together = stream.get_final_completion()
    whole = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=24, logprobs=True, top_logprobs=2
    )
    assert len(pieces) > 12
    for choice in together.choices:
        assert choice.message.content == whole.choices[0].message.content
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert whole.choices[0].logprobs is not None
        tokens = [entry.token for entry in choice.logprobs.content]
        assert tokens == [entry.token for entry in whole.choices[0].logprobs.content or []]


def test_chat_logprobs(client: OpenAI, server: ServerProcess, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=24, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content  # without the end token
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob


def test_completions(client: OpenAI, server: ServerProcess, model: str) -> None:
    own = server.generate(PROMPT, max_tokens=8, logprobs=2)["choices"][0]
    answer = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=8, logprobs=2)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (own["text"], "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [entry["token"] for entry in own["logprobs"]]
    assert choice.logprobs.token_logprobs == pytest.approx(
        [entry["logprob"] for entry in own["logprobs"]], abs=1e-4
    )
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.text_offset is not None
    for entry, top, offset in zip(
        own["logprobs"], choice.logprobs.top_logprobs, choice.logprobs.text_offset, strict=True
    ):
        assert top == pytest.approx({token["token"]: token["logprob"] for token in entry["top"]}, abs=1e-4)
        assert choice.text[offset:].startswith(entry["token"])


def test_several_prompts_as_texts_and_tokens(client: OpenAI, server: ServerProcess, model: str) -> None:
    prompts = [PROMPT, "Once upon a time"]
    expected = [server.text(prompt, max_tokens=6) for prompt in prompts]
    answer = client.completions.create(model=model, prompt=prompts, temperature=0, max_tokens=6)
    assert [choice.text for choice in answer.choices] == expected
    chunks = list(client.completions.create(model=model, prompt=prompts, temperature=0, max_tokens=6, stream=True))
    for index, text in enumerate(expected):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == text
        assert own[-1].finish_reason == "length"
    ids = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    answer = client.completions.create(model=model, prompt=[ids, ids], temperature=0, max_tokens=6)
    assert [choice.text for choice in answer.choices] == expected[:1] * 2


def test_choices_and_seeds(client: OpenAI, model: str) -> None:
    def texts(n: int, seed: int) -> list[str]:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, n=n, seed=seed)
        return [choice.text for choice in answer.choices]

    first = texts(3, 1)
    assert len(set(first)) == 3
    assert texts(3, 1) == first
    assert texts(1, 1) == first[:1]
    assert texts(1, 2) != first[:1]


def test_stop(client: OpenAI, server: ServerProcess, model: str) -> None:
    whole = chat_of(server, max_tokens=24)
    stop = " " + whole.split()[3]
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=24, stop=[stop, "###"], logprobs=True
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (whole.partition(stop)[0], "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 3


def test_adapter_expressions(client: OpenAI, server: ServerProcess) -> None:
    for expression, resolved in [("left", "left@1"), ("left*0.5 + right@1*-0.25", "left@1*0.5+right@1*-0.25")]:
        answer = client.completions.create(model=expression, prompt=PROMPT, temperature=0, max_tokens=8)
        assert answer.choices[0].text == server.text(PROMPT, adapter=expression, max_tokens=8)
        assert answer.model == resolved
        again = client.completions.create(model=answer.model, prompt=PROMPT, temperature=0, max_tokens=8)
        assert (again.model, again.choices[0].text) == (resolved, answer.choices[0].text)


def test_biases_and_penalties(client: OpenAI, model: str) -> None:
    def text(prompt: str, max_tokens: int, **fields: object) -> str:
        answer = client.completions.create(
            model=model, prompt=prompt, temperature=0, max_tokens=max_tokens, extra_body=fields
        )
        return answer.choices[0].text

    paris = 7042  # " Paris"
    assert text(PROMPT, 1) == " Paris"
    assert " Paris" not in text(PROMPT, 4, logit_bias={paris: -100})
    assert text(PROMPT, 3, logit_bias={paris: 100}) == " Paris" * 3
    loop = "a b c a b c a b c"
    plain = len(set(text(loop, 8).split()))
    for penalty in ("frequency_penalty", "presence_penalty"):
        assert len(set(text(loop, 8, **{penalty: 2.0}).split())) > plain


def test_scores_of_prompts(client: OpenAI, model: str) -> None:
    """A continuation's score by `echo` is that of generating it, for a text and for its tokens."""
    made = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=2, logprobs=1)
    (choice,) = made.choices
    assert choice.logprobs is not None
    own = choice.logprobs.token_logprobs
    ids = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    rest = client.post("/../tokenize", body={"prompt": choice.text}, cast_to=httpx.Response).json()["tokens"]
    for prompt in (PROMPT + choice.text, [*ids, *rest]):
        for max_tokens in (0, 1):
            answer = client.completions.create(
                model=model, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
            )
            (scored,) = answer.choices
            assert scored.text.startswith(PROMPT + choice.text)
            assert scored.logprobs is not None
            found = cast("list[float | None]", scored.logprobs.token_logprobs)  # its type has no null
            assert len(found) == len(ids) + 2 + max_tokens
            assert found[0] is None
            assert found[len(ids) : len(ids) + 2] == pytest.approx(own, abs=1e-3)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == max_tokens


def test_fields_of_vllm(client: OpenAI, model: str) -> None:
    """They are sent in `extra_body`."""

    def complete(**fields: object) -> CompletionChoice:
        answer = client.completions.create(
            model=model, prompt=PROMPT, temperature=0, max_tokens=12, extra_body=fields
        )
        return answer.choices[0]

    period = 30  # "."
    plain = complete().text
    assert "." in plain
    ended = complete(stop_token_ids=[period])
    assert (ended.text, ended.finish_reason) == (plain.partition(".")[0] + ".", "stop")
    assert complete(stop_token_ids=[period], min_tokens=12).finish_reason == "length"
    scored = complete(prompt_logprobs=1).model_extra
    assert scored is not None
    first, *others = scored["prompt_logprobs"]
    assert first is None
    assert len(others) == 4
    for choices in (["London", "Berlin"], [" Paris", " Paris, France"]):
        chosen = complete(structured_outputs={"choice": choices})
        assert chosen.text in choices
        assert chosen.finish_reason == "stop"
    assert complete(structured_outputs={"choice": [" Paris", " Rome"]}, logprobs=1).text == " Paris"


def test_the_last_turn_is_continued(client: OpenAI, server: ServerProcess, model: str) -> None:
    whole = chat_of(server, max_tokens=24)
    begun = whole[: len(whole) // 2].rstrip()
    messages: list[ChatCompletionMessageParam] = [*MESSAGES, {"role": "assistant", "content": begun}]
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=24,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert begun + str(answer.choices[0].message.content) == whole
    assert answer.choices[0].finish_reason == "stop"


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["city", "country"]
    capital: bool


def test_answers_follow_a_schema(client: OpenAI, model: str) -> None:
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Describe Paris as JSON."}]
    for seed in range(3):
        parsed = client.chat.completions.parse(
            model=model, messages=question, response_format=Place, max_tokens=48, seed=seed
        )
        assert parsed.choices[0].finish_reason == "stop"
        assert isinstance(parsed.choices[0].message.parsed, Place)
    # in a batch with others, and streamed
    with client.chat.completions.stream(
        model=model, messages=question, response_format=Place, max_tokens=48, n=2, seed=9
    ) as stream:
        final = stream.get_final_completion()
    assert all(isinstance(choice.message.parsed, Place) for choice in final.choices)


def test_any_json_object(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": 'Repeat: {"a": 1}'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=48,
    )
    (choice,) = answer.choices
    assert choice.message.content is not None
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_refusals(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (caught.value.param, caught.value.type) == ("tools", "invalid_request_error")
    assert caught.value.request_id  # X-Request-Id
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=MAX_MODEL_LEN)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=PROMPT, logit_bias={"49152": 1})
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=[49152])
    assert caught.value.param == "prompt"
    hostile: JSONSchema = {"name": "a", "schema": {"type": "string", "pattern": "(a|aa)*" * 400 + "("}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": hostile},
        )
    assert caught.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.NotFoundError, match="nobody") as lost:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert (lost.value.code, lost.value.param) == ("model_not_found", "model")
    # a stream is refused before it begins, too
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="left@99", prompt=PROMPT, stream=True)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="a", encoding_format="float")


def test_unknown_key_is_refused(converted_tiny: Path, tmp_path: Path) -> None:
    with running(tmp_path, converted_tiny, api_keys="secret-0123456789") as server:
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with OpenAI(base_url=f"{server.url}/v1", api_key="secret-0123456789", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny-llama"]


def test_client_retries_a_full_queue(client: OpenAI, server: ServerProcess, model: str) -> None:
    """A refused client retries after the given time, and is served."""
    before = server.counts()[REFUSED]
    hog = client.completions.create(
        model=model,
        prompt=PROMPT,
        n=MAX_NUM_SEQS + MAX_QUEUE,
        max_tokens=480,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(hog))
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=model, prompt=PROMPT, max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1

    def leave() -> None:
        wait_until(lambda: server.metrics()[REFUSED] >= before + 2, what="the second refusal")
        hog.close()

    leaving = threading.Thread(target=leave)
    leaving.start()
    response = client.with_options(max_retries=5).completions.with_raw_response.create(
        model=model, prompt=PROMPT, max_tokens=1
    )
    leaving.join()
    assert response.retries_taken >= 1
    assert len(response.parse().choices) == 1


def test_asynchronous_client(server: ServerProcess, client: OpenAI, model: str) -> None:
    """Four requests run at once, and one leaves its stream; nothing stays behind (the fixture checks)."""

    async def go() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=PATIENCE) as client:

            async def ask(number: int) -> str:
                answer = await client.completions.create(
                    model=model, prompt=PROMPT, max_tokens=6, temperature=0, seed=number
                )
                return answer.choices[0].text

            stream = await client.completions.create(model=model, prompt=PROMPT, max_tokens=200, stream=True)
            async for _ in stream:
                break
            texts = await asyncio.gather(*map(ask, range(3)))
            await stream.close()
            return texts

    assert asyncio.run(go()) == [server.text(PROMPT, max_tokens=6)] * 3

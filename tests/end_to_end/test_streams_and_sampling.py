"""Options of an answer over HTTP: streams, choices, stop strings, logprobs, seeds."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.end_to_end.server_process import ServerProcess

pytestmark = pytest.mark.real

PROMPT = "Once upon a time, in a village by the sea,"


def test_a_stream_is_the_answer_in_pieces(server: ServerProcess) -> None:
    body = {"adapter": "left", "max_tokens": 160, "ignore_eos": True}
    whole = server.generate(PROMPT, **body)
    with server.stream(PROMPT, **body) as events:
        first = next(events)
        assert set(first) == {"index", "text"}
        server.wait_for(requests_running=1)  # it arrived before the end
        *pieces, last = events
    assert first["text"] + "".join(piece["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert len(pieces) > 12
    assert last["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert (last["model"], last["adapters"]) == (whole["model"], whole["adapters"])
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 160
    assert last["id"] != whole["id"]


def test_pieces_are_whole_characters(server: ServerProcess) -> None:
    """The first character takes three tokens, the third one two."""
    prompt = "漢字🙂é" * 8
    assert server.text(prompt, max_tokens=24) == "漢字🙂é漢字🙂é漢字🙂é漢"
    with server.stream(prompt, max_tokens=24) as events:
        pieces = [event["text"] for event in events if "text" in event]
    assert pieces == list("漢字🙂é漢字🙂é漢字🙂é漢")


def test_stop_string_across_tokens_is_cut_off(server: ServerProcess) -> None:
    whole = server.generate(PROMPT, max_tokens=24, logprobs=1)["choices"][0]
    tokens = [entry["token"] for entry in whole["logprobs"]]
    assert "".join(tokens) == whole["text"]
    stop = tokens[7][-1] + tokens[8] + tokens[9][:1]
    expected = whole["text"].partition(stop)[0]
    assert 0 < len(expected) < len(whole["text"])
    for stops in (stop, ["never said", stop]):
        choice = server.generate(PROMPT, max_tokens=24, stop=stops)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    with server.stream(PROMPT, max_tokens=24, stop=stop) as events:
        *pieces, last = events
    assert "".join(piece["text"] for piece in pieces) == expected
    assert last["finish_reason"] == "stop"


def test_choices_differ_and_are_repeatable(server: ServerProcess) -> None:
    body = {"temperature": 0.9, "seed": 3, "max_tokens": 12}
    answer = server.generate(PROMPT, n=3, **body)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == 36
    assert server.text(PROMPT, **body) == texts[0]
    with server.stream(PROMPT, n=3, **body) as events:
        streamed, ends = ["", "", ""], []
        for event in events:
            streamed[event["index"]] += event.get("text", "")
            if "finish_reason" in event:
                ends.append(event["index"])
    assert streamed == texts
    assert sorted(ends) == [0, 1, 2]


def test_answer_names_its_seed(server: ServerProcess) -> None:
    body = {"temperature": 1.0, "max_tokens": 8}
    drawn = server.generate(PROMPT, **body)
    assert server.text(PROMPT, seed=drawn["seed"], **body) == drawn["choices"][0]["text"]
    assert server.generate(PROMPT, **body)["seed"] != drawn["seed"]


def test_seeded_answers_do_not_depend_on_the_batch(server: ServerProcess) -> None:
    adapters = ["base", "left", "right", "left*0.5+right*-0.5"]
    requests = [
        {"adapter": adapter, "seed": seed, "temperature": 0.8, "top_p": 0.95, "max_tokens": 12}
        for seed in (1, 2)
        for adapter in adapters
    ]
    prompts = [f"{PROMPT} on day {number}" for number in range(len(requests))]
    with ThreadPoolExecutor(len(requests)) as crowd:
        together = list(crowd.map(lambda i: server.text(prompts[i], **requests[i]), range(len(requests))))
    alone = [server.text(prompt, **request) for prompt, request in zip(prompts, requests, strict=True)]
    assert together == alone
    assert len(set(alone)) > len(adapters)

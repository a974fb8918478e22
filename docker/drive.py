"""The client's side of docker/check: one step by name, against a running server. Exits with 1 where it fails."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

PROMPT = {"messages": [{"role": "user", "content": "What is a container?"}], "temperature": 0, "max_tokens": 24}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
READY_WITHIN = 180.0  # seconds
TRAINED_WITHIN = 600.0  # seconds, for what takes some thirty on two free cores
CODES = {"200": "OK", "404": "Not Found", "418": "I'm a Teapot", "503": "Service Unavailable"}
NUM_VARIANTS = 8  # adapters that `publish` takes in turn: others' bytes each time
PUBLISHED = "many"
NUM_STEPS = 200  # of the job that is disturbed
QUESTION = {"prompt": "HTTP 404:", "temperature": 0, "max_tokens": 8}


@dataclass(frozen=True)
class Answer:
    """What is looked at in an answer of /generate."""

    text: str
    finish_reason: str
    versions: list[int]  # of the adapters it used
    completion_tokens: int


def wait(client: httpx.Client, scratch: Path) -> None:
    """Until /ready says 200."""
    started = time.monotonic()
    last = "nothing"
    while time.monotonic() - started < READY_WITHIN:
        try:
            answer = client.get("/ready")
        except httpx.TransportError as error:
            last = str(error)
        else:
            if answer.status_code == 200:
                say(f"ready after {time.monotonic() - started:.1f} s")
                return
            last = f"{answer.status_code} {answer.text}"
        time.sleep(0.25)
    raise SystemExit(f"not ready after {READY_WITHIN:.0f} s: {last}")


def tour(client: httpx.Client, scratch: Path) -> None:
    """Generate, upload, list, generate with the adapter, and at no weight."""
    base = generate(client, {})
    expect(base.versions == [], "the base's answer names no adapters")
    files = make_adapter(scratch)
    uploaded = client.post(
        "/adapters/check",
        files={name.split(".")[0]: (name, (files / name).read_bytes()) for name in ADAPTER_FILES},
    )
    expect(uploaded.status_code == 201, f"the upload answers 201, not {uploaded.status_code} {uploaded.text}")
    listed(client, "check")
    adapted = generate(client, {"adapter": "check"})
    expect(adapted.versions == [1], "the answer names the version it used")
    expect(adapted.text != base.text, "the adapter changes the text")
    expect(generate(client, {"adapter": "check*0"}).text == base.text, "at weight 0 it is the base")


def submit(client: httpx.Client, scratch: Path) -> None:
    """A job, which waits: the server's container has no workers."""
    job = {
        "name": "codes",
        "data": [{"prompt": f"HTTP {code}:", "completion": f" {phrase}"} for code, phrase in CODES.items()],
        "lora": {"rank": 8},
        "training": {
            "max_steps": 40,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "warmup_ratio": 0.2,
            "max_length": 32,
        },
    }
    answer = client.post("/train", json=job)
    expect(answer.status_code == 202, f"/train answers 202, not {answer.status_code} {answer.text}")
    (scratch / "job").write_text(answer.json()["id"])
    time.sleep(5)
    expect(job_of(client, scratch)["status"] == "queued", "nobody trains in the server's container")


def trained(client: httpx.Client, scratch: Path) -> None:
    """The job succeeds, and the next request has its adapter, with no restart."""
    started = time.monotonic()
    job = ended(client, scratch)
    say(f"trained in {time.monotonic() - started:.1f} s: {job['progress']}")
    expect(generate(client, {}, QUESTION).text.strip() != CODES["404"], "the base doesn't know the phrase")
    answer = generate(client, {"adapter": "codes"}, QUESTION)
    expect(answer.versions == [1], "the answer names the new version")
    expect(answer.text.strip() == CODES["404"], "the adapter knows the phrase")
    listed(client, "check", "codes")


def long(client: httpx.Client, scratch: Path) -> None:
    """A request that is still running when the server is told to stop."""
    answer = generate(client, {"max_tokens": 200, "ignore_eos": True})
    expect(answer.completion_tokens == 200, "the running request got all its tokens")
    expect(answer.finish_reason == "length", "and ended by itself")


def again(client: httpx.Client, scratch: Path) -> None:
    """After a restart."""
    listed(client, "check", "codes")
    generate(client, {"adapter": "check@1"})
    expect(generate(client, {"adapter": "codes"}, QUESTION).text.strip() == CODES["404"], "it still knows it")


def publish(client: httpx.Client, scratch: Path) -> None:
    """Publish and delete versions until there is a file `enough`, whatever is killed; what was told is kept."""
    variants = [make_adapter(scratch, seed) for seed in range(NUM_VARIANTS)]
    told = Told({}, [], [])
    number = 0
    while not (scratch / "enough").exists():
        files = variants[number % NUM_VARIANTS]
        parts = {name.split(".")[0]: (name, (files / name).read_bytes()) for name in ADAPTER_FILES}
        try:
            answer = client.post(f"/adapters/{PUBLISHED}", files=parts)
            if answer.status_code == 201:
                told.published[str(answer.json()["version"])] = answer.json()["digest"]
                number += 1
                if number % 3 == 0:
                    doomed = str(int(answer.json()["version"]) - 1)
                    told.doubtful.append(doomed)
                    if client.delete(f"/adapters/{PUBLISHED}/{doomed}").status_code == 204:
                        told.deleted.append(doomed)
        except httpx.TransportError:  # it was killed: nobody knows what became of it
            time.sleep(0.2)
    (scratch / "told").write_text(json.dumps(vars(told)))
    say(f"{len(told.published)} versions were published, {len(told.deleted)} deleted")


@dataclass(frozen=True)
class Told:
    """What a server has answered: versions with their digests, and those that it has deleted, or may have."""

    published: dict[str, str]
    deleted: list[str]
    doubtful: list[str]


def train(client: httpx.Client, scratch: Path) -> None:
    """A job that takes a while, with checkpoints."""
    steps = {"max_steps": NUM_STEPS, "batch_size": 4, "max_length": 32, "checkpoint_steps": 5}
    rows = [{"prompt": f"HTTP {code}:", "completion": f" {phrase}"} for code, phrase in CODES.items()]
    answer = client.post("/train", json={"name": "churned", "data": rows, "training": steps})
    expect(answer.status_code == 202, f"/train answers 202, not {answer.status_code} {answer.text}")
    (scratch / "job").write_text(answer.json()["id"])


def kept(client: httpx.Client, scratch: Path) -> None:
    """After all kills: what an answer said is still so, every version has its bytes, and the job ended once."""
    told = Told(**json.loads((scratch / "told").read_text()))
    expect(len(told.published) > NUM_VARIANTS, "a number of versions were published")
    found = client.get(f"/adapters/{PUBLISHED}").raise_for_status().json()["versions"]
    there = {str(version["version"]): version["digest"] for version in found}
    for version, digest in told.published.items():
        if version not in told.doubtful:
            expect(there.get(version) == digest, f"{PUBLISHED}@{version} is there, with its bytes")
    expect(not there.keys() & set(told.deleted), "what was deleted is gone")
    for version in there:
        body = {**PROMPT, "adapter": f"{PUBLISHED}@{version}", "max_tokens": 1}
        expect(client.post("/generate", json=body).status_code == 200, f"{PUBLISHED}@{version} can be used")
    job = ended(client, scratch)
    steps = [event["data"]["step"] for event in events_of(client, scratch) if event["type"] == "metrics"]
    expect(steps == list(range(1, NUM_STEPS + 1)), f"every step was told once: {len(steps)} of {NUM_STEPS}")
    versions = client.get("/adapters/churned").raise_for_status().json()["versions"]
    expect([version["job_id"] for version in versions] == [job["id"]], "it published one version")
    generate(client, {"adapter": "churned"}, QUESTION)
    say(f"{len(there)} versions are there; the job took {job['attempt']} attempts")


def ended(client: httpx.Client, scratch: Path) -> dict[str, Any]:
    """The job, which succeeds."""
    started = time.monotonic()
    while (job := job_of(client, scratch))["status"] in ("queued", "running"):
        expect(time.monotonic() - started < TRAINED_WITHIN, f"the job ends in time: {job}")
        time.sleep(0.5)
    expect(job["status"] == "succeeded", f"the job succeeds: {job}")
    return job


def events_of(client: httpx.Client, scratch: Path) -> list[dict[str, Any]]:
    """All of the job's."""
    path = f"/train/{(scratch / 'job').read_text()}/events"
    found: list[dict[str, Any]] = []
    while page := client.get(path, params={"after": found[-1]["seq"] if found else 0}).raise_for_status().json():
        found += page
    return found


def remember(client: httpx.Client, scratch: Path) -> None:
    """Greedy answers with log-probabilities, for `same` to compare with."""
    (scratch / "answers").write_text(json.dumps(choices(client)))


def same(client: httpx.Client, scratch: Path) -> None:
    """What a restored server answers, to the last bit."""
    expect(choices(client) == json.loads((scratch / "answers").read_text()), "the same answers, to the last bit")


def choices(client: httpx.Client) -> list[Any]:
    asked = [
        {**QUESTION, "logprobs": 2, **more} for more in ({}, {"adapter": "codes"}, {"adapter": "codes+check"})
    ]
    return [client.post("/generate", json=body).raise_for_status().json()["choices"] for body in asked]


def job_of(client: httpx.Client, scratch: Path) -> dict[str, Any]:
    """The job that `submit` made."""
    job: dict[str, Any] = client.get(f"/train/{(scratch / 'job').read_text()}").raise_for_status().json()
    return job


def listed(client: httpx.Client, *names: str) -> None:
    adapters = client.get("/adapters").raise_for_status().json()["adapters"]
    found = {adapter["name"]: [version["version"] for version in adapter["versions"]] for adapter in adapters}
    expect(found == {name: [1] for name in names}, f"these are listed, in one version each: {found}")


def make_adapter(scratch: Path, seed: int = 0) -> Path:
    """What PEFT saves for a model of the base's sizes: rank 4 on two layers' q and v, with a strong effect."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(
        r=4,
        lora_alpha=64,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[3, 4],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    place = scratch / f"adapter-{seed}"
    get_peft_model(LlamaForCausalLM(sizes), lora).save_pretrained(str(place))
    return place


def generate(client: httpx.Client, more: Mapping[str, object], prompt: Mapping[str, object] = PROMPT) -> Answer:
    """One request for the same prompt, with `more` in its body."""
    answer = client.post("/generate", json={**prompt, **more})
    expect(answer.status_code == 200, f"/generate answers 200, not {answer.status_code} {answer.text}")
    body = answer.json()
    (choice,) = body["choices"]
    versions = [part["version"] for part in body["adapters"]]
    say(f"{dict(more) or 'base'}: {choice['text']!r}")
    return Answer(choice["text"], choice["finish_reason"], versions, body["usage"]["completion_tokens"])


def expect(truth: bool, what: str) -> None:
    if not truth:
        raise SystemExit(f"docker/check: not so: {what}")


def say(line: str) -> None:
    sys.stdout.write(f"   {line}\n")
    sys.stdout.flush()


STEPS: Mapping[str, Callable[[httpx.Client, Path], None]] = {
    "wait": wait,
    "tour": tour,
    "submit": submit,
    "trained": trained,
    "long": long,
    "again": again,
    "publish": publish,
    "train": train,
    "kept": kept,
    "remember": remember,
    "same": same,
}

if __name__ == "__main__":
    step, address, folder = sys.argv[1:]
    with httpx.Client(base_url=address, timeout=120) as session:
        STEPS[step](session, Path(folder))

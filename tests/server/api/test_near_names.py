"""Suggestions in errors about unknown names."""

import httpx
import pytest

from server.config.environment import unknown_variables

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("path", "body", "loc", "message"),
    [
        ("/generate", {"promt": "a"}, ["promt"], "no such field: did you mean prompt?"),
        ("/generate", {"prompt": "a", "adaptor": "x"}, ["adaptor"], "no such field: did you mean adapter?"),
        ("/generate", {"prompt": "a", "zzzz": 1}, ["zzzz"], "no such field"),
        (
            "/generate",
            {"messages": [{"role": "user", "contnet": "a"}]},
            None,
            "no such field: did you mean content?",
        ),
        ("/train", {"name": "a", "epochs": 3}, ["epochs"], "no such field here: it belongs under training"),
        ("/train", {"name": "a", "rank": 8}, ["rank"], "no such field here: it belongs under lora"),
        (
            "/train",
            {"name": "a", "training": {"learnign_rate": 1}},
            ["training", "learnign_rate"],
            "no such field: did you mean learning_rate?",
        ),
        (
            "/train",
            {"name": "a", "training": {"publish_if": "always"}},
            ["training", "publish_if"],
            "no such field here: it belongs at the top level",
        ),
        ("/train", {"name": "a", "eval_dataset": []}, ["eval_dataset"], "no such field: did you mean validation?"),
        ("/compare", {"prompt": "a", "adapter": "x"}, ["adapter"], "no such field: did you mean adapters?"),
        ("/generate", {"prompt": "a", "model": "x"}, ["model"], "no such field: did you mean adapter?"),
        (
            "/generate",
            {"prompt": "a", "guided_choice": ["b"]},
            ["guided_choice"],
            "no such field: did you mean structured_outputs?",
        ),
    ],
)
async def test_unknown_fields(
    client: httpx.AsyncClient, path: str, body: dict[str, object], loc: list[str] | None, message: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 422
    found = {tuple(error["loc"]): error["message"] for error in response.json()["errors"]}
    assert message in (found.values() if loc is None else [found[tuple(loc)]])


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("lora", "r", "no such field: did you mean rank?"),
        ("lora", "lora_r", "no such field: did you mean rank?"),
        ("lora", "lora_alpha", "no such field: did you mean alpha?"),
        ("lora", "use_dora", "no such field"),  # not a misspelt use_rslora
        ("lora", "target_module", "no such field: did you mean target_modules?"),
        ("training", "num_train_epochs", "no such field: did you mean epochs?"),
        ("training", "save_steps", "no such field: did you mean checkpoint_steps?"),
        ("training", "lr", "no such field: did you mean learning_rate?"),
        (
            "training",
            "gradient_accumulation_steps",
            "no such field: did you mean batch_size? It is all rows of an optimizer step, accumulated ones too.",
        ),
        (
            "training",
            "warmup_steps",
            "no such field: did you mean warmup_ratio? It is a share of all steps.",
        ),
    ],
)
async def test_names_of_peft_and_trl(client: httpx.AsyncClient, part: str, name: str, message: str) -> None:
    response = await client.post("/train", json={"name": "a", "data": [{"text": "a"}], part: {name: 1}})
    assert response.json()["errors"] == [{"loc": [part, name], "message": message}]


async def test_unknown_openai_fields(client: httpx.AsyncClient) -> None:
    body = {"model": "base", "prompt": "a", "max_token": 5}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "max_token: no such field: did you mean max_tokens?"


@pytest.mark.parametrize("with_model", [False, True])
async def test_our_name_of_a_model_is_explained_to_openais_clients(
    client: httpx.AsyncClient, with_model: bool
) -> None:
    body = {
        "adapter": "x",
        "messages": [{"role": "user", "content": "a"}],
        **({"model": "base"} if with_model else {}),
    }
    error = (await client.post("/v1/chat/completions", json=body)).json()["error"]
    messages = ["adapter: no such field: did you mean model?"]
    messages = messages if with_model else ["model: is missing", *messages]
    assert error["message"] == "; ".join(messages)
    assert error["param"] == ("adapter" if with_model else "model")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *(
            (path, "no such path (the client's base URL must end with /v1): /docs lists them")
            for path in ("/chat/completions", "/completions", "/files", "/fine_tuning/jobs", "/models")
        ),
        (
            "/v1/chat/completions/chat/completions",
            "no such path (did you mean /v1/chat/completions?): /docs lists them",
        ),
        ("/v1/responses", "no such path (did you mean /v1/chat/completions?): /docs lists them"),
        ("/v1/messages", "no such path (did you mean /v1/chat/completions?): /docs lists them"),
        ("/v1/v1/completions", "no such path (did you mean /v1/completions?): /docs lists them"),
        ("/v1/generat", "no such path (did you mean /generate?): /docs lists them"),
        ("/v1/moderations", "no such path: /docs lists them"),
        ("/v1/evals", "no such path: /docs lists them"),
        ("/v1/embeddings", "no such path: /docs lists them"),
        ("/embeddings", "no such path: /docs lists them"),  # it isn't there with /v1, either
        ("/responses", "no such path: /docs lists them"),
        ("/" + "a" * 1000, "no such path: /docs lists them"),
    ],
)
async def test_paths_of_clients_with_a_wrong_base_url(client: httpx.AsyncClient, path: str, message: str) -> None:
    response = await client.post(path, json={})
    assert response.status_code == 404
    answer = response.json()
    is_openais = path.startswith("/v1/") or "base URL" in message
    assert (answer["error"]["message"] if is_openais else answer["detail"]) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a",}', "is not JSON: trailing comma at line 1 column 16"),
        (b'{"prompt": "a"\n "n": 2}', "is not JSON: expected `,` or `}` at line 2 column 2"),
        (b"prompt=a", "is not JSON: expected value at line 1 column 1"),
    ],
)
async def test_bad_json_says_where(client: httpx.AsyncClient, content: bytes, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = await client.post("/generate", content=content, headers=headers)
    assert response.status_code == 422
    assert response.json()["errors"] == [{"loc": ["body"], "message": message}]


def test_unknown_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_variables() == []
    for name in ("SMOLORA_PROT", "SMOLORA_URL", "SMOLORA_PORT", "SMOLORA_XYZ"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == [
        "SMOLORA_PROT is not a setting: did you mean SMOLORA_PORT?",
        "SMOLORA_XYZ is not a setting",
    ]

"""Suggestions for unknown names and paths: `promt` is close to `prompt`, `epochs` belongs under `training`."""

from collections.abc import Iterable, Iterator
from typing import get_args

from pydantic import BaseModel

from adapters.names import near

_PEERS = {
    "r": "rank",
    "lora_r": "rank",
    "lora_target_modules": "target_modules",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "use_dora": None,
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "max_seq_length": "max_length",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_ratio",
    "eval_dataset": "validation",
    "save_steps": "checkpoint_steps",
}
"""Names of fields in PEFT and TRL, with our names of these fields. None means that we have no such field, only
one with a similar name."""

_PEERS_OPTIONS = {"early_stopping_patience": "patience", "use_rslora": "rslora"}
"""Further names in PEFT and TRL, with our options of `smolora train` for them. No field of ours is named like
these options."""

_PEER_UNITS = {
    "per_device_train_batch_size": "all rows of an optimizer step, accumulated ones too",
    "gradient_accumulation_steps": "all rows of an optimizer step, accumulated ones too",
    "warmup_steps": "a share of all steps",
}
"""What our field counts, if the field with this name in PEFT or TRL counts something else."""

_OTHER_API = {
    "adapter": "model",
    "model": "adapter",
    "max_completion_tokens": "max_tokens",
    "guided_choice": "structured_outputs",
    "guided_json": "response_format",
    "guided_regex": "regex",
}
"""Names of fields in our other API, OpenAI's or ours, and in older versions of vLLM, with the names here."""

_CHAT, _CHAT_PEERS = "/v1/chat/completions", ("/v1/responses", "/v1/messages")
"""Our path for chats, and those of OpenAI's and Anthropic's newer APIs, which no similarity of names connects."""

WITHOUT_V1 = ("/chat/completions", "/completions", "/files", "/fine_tuning/jobs", "/models")
"""Our paths under /v1 as OpenAI's client requests them if its base URL lacks /v1."""


def unknown_path(path: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown path. `known` are the paths of all routes.

    The message suggests the route that the path ends with, since libraries append paths to a wrong base URL.
    Otherwise it suggests the route with the most similar name. A shared prefix /v1 doesn't count: it would make
    any two short paths similar.
    """
    routes = {_bare(route): route for route in known}
    name = _bare(path)
    appended = (route for route in routes if route and f"/{name}".endswith(f"/{route}"))
    similar = max(appended, key=len, default=None) or near(name, routes)
    meant = _CHAT if path in _CHAT_PEERS else similar and routes[similar]
    hint = f" (did you mean {meant}?)" if meant else ""
    hint = " (the client's base URL must end with /v1)" if path in WITHOUT_V1 else hint
    return f"no such path{hint}: /docs lists them"


def _bare(path: str) -> str:
    return path.removeprefix("/v1/").removeprefix("/")


def unknown_field(loc: tuple[str | int, ...], body: type[BaseModel] | None) -> str:
    """Return the error message for an unknown field of `body` at the location `loc`."""
    name = str(loc[-1])
    here = None if body is None else _model_at(body, loc[:-1])
    if body is None or here is None:
        return "no such field"
    if elsewhere := [path for path, model in _models(body) if model is not here and name in _names(model)]:
        return f"no such field here: it belongs {f'under {elsewhere[0]}' if elsewhere[0] else 'at the top level'}"
    names = _names(here)
    meant = _PEERS[name] if name in _PEERS else near(name, names) or _OTHER_API.get(name)
    if meant not in names:
        return "no such field"
    return f"no such field: did you mean {meant}?{_unit(name)}"


def peers_option(flag: str) -> str | None:
    """Return the error message for an option of PEFT or TRL such as --lora_r, or None for any other option."""
    name = flag.removeprefix("--").replace("-", "_")
    options = _PEERS | _PEERS_OPTIONS
    if name not in options:
        return None
    meant = options[name]
    hint = f" (did you mean --{meant.replace('_', '-')}?){_unit(name)}" if meant else ""
    return f"No such option: {flag}{hint}"


def _unit(name: str) -> str:
    return f" It is {_PEER_UNITS[name]}." if name in _PEER_UNITS else ""


def _names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def _model_at(model: type[BaseModel], path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Return the model of the object at `path` inside `model`, or None if there is no object at `path`."""
    for part in path:
        if isinstance(part, int):
            continue
        found = dict(_inner(model)).get(part)
        if found is None:
            return None
        model = found
    return model


def _models(body: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield `body` and all models within it, each with its path."""
    yield prefix, body
    for name, model in _inner(body):
        yield from _models(model, f"{prefix}.{name}" if prefix else name)


def _inner(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield those fields of `model` that are objects or lists of objects, with their models."""
    for name, field in model.model_fields.items():
        if (found := _model_in(field.annotation)) is not None:
            yield field.alias or name, found


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)

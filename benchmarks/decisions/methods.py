"""Three classifiers, trained on the same rows: an adapter on decisions, PEFT's, and a linear one on TF-IDF."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.command import Say
from benchmarks.decisions.data import DataSet, Labelled
from benchmarks.peers.venvs import MadePeer
from server.client.client import ENDED, Client
from server.decisions.calibration import fit_temperature, log_loss
from server.training.spec import LEARNING_RATES, LoraSpec, TrainingSpec
from server.training.trainer import learning_rate, shuffled

ADAPTER, PEFT, LINEAR = "adapter on decisions", "PEFT, classification head", "TF-IDF, logistic regression"
PEFT_RATES = (LEARNING_RATES["lora"], LEARNING_RATES["lora"] / 3)
"""The better one by the validation rows is used: PEFT's classes have no default."""
MEASURED_AT_ONCE = 64
"""Texts of a request, and of PEFT's batch."""
POLL = 1.0


@dataclass(frozen=True)
class Scored:
    """A method's scores of the options for each test row, which are probabilities after softmax(score / T)."""

    scores: npt.NDArray[np.float64]
    temperature: float
    settings: str


def adapter(url: str, name: str, data: DataSet, say: Say) -> Scored:
    """Train an adapter with the service's defaults, and ask the service for its probabilities."""
    with Client(url) as client:
        body: dict[str, object] = {
            "name": name,
            "data": data.rows(data.train),
            "validation": data.rows(data.validation),
            "questions": {name: data.question.document()},
        }
        job = client.train(body)
        while job["status"] not in ENDED:
            time.sleep(POLL)
            job = client.job(str(job["id"]))
        if job["status"] != "succeeded":
            raise RuntimeError(f"the job {job['status']}: {job['error']}")
        say(f"  trained: {job['metrics']}")
        config = cast("Mapping[str, Mapping[str, Mapping[str, float]]]", client.version(name, 1)["config"])
        temperature = config["decisions"]["temperatures"].get(data.question.digest, 1.0)
        found: list[list[float]] = []
        for start in range(0, len(data.test), MEASURED_AT_ONCE):
            texts = [one.text for one in data.test[start : start + MEASURED_AT_ONCE]]
            answer = client.decide({"adapter": f"{name}@1", "input": texts})
            results = cast("list[Mapping[str, list[Mapping[str, object]]]]", answer["results"])
            found += [_distribution(result["answers"][0]) for result in results]
        training = cast("Mapping[str, object]", job["progress"])
    scores = temperature * np.log(np.maximum(found, 1e-300))  # /decide has divided them by T
    return Scored(scores, temperature, f"{training['total_steps']} steps")


def _distribution(answer: Mapping[str, object]) -> list[float]:
    if answer["type"] == "predicate":
        p = cast("float", answer["probability"])
        return [p, 1 - p]
    return [one["probability"] for one in cast("list[Mapping[str, float]]", answer["probabilities"])]


def linear(peer: MadePeer, data: DataSet) -> Scored:
    """Train scikit-learn's logistic regression on TF-IDF in its own environment."""
    given = {
        name: {"texts": [one.text for one in part], "answers": [one.answer for one in part]}
        for name, part in (("train", data.train), ("validation", data.validation), ("test", data.test))
    }
    done = subprocess.run(
        [peer.python, Path(__file__).with_name("linear_child.py")],
        input=json.dumps({**given, "num_options": len(data.question.options)}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    validation, test = (np.log(np.maximum(part, 1e-300)) for part in found["probabilities"])
    return _calibrated(validation, test, data, found["settings"])


class _Classifier(Protocol):
    """The parts used of PEFT's wrapper of a model."""

    def __call__(self, **inputs: torch.Tensor) -> "_Output": ...
    def parameters(self) -> Sequence[torch.nn.Parameter]: ...
    def train(self, mode: bool = True) -> object: ...


class _Output(Protocol):
    logits: torch.Tensor


def peft(base: Path, data: DataSet, say: Say) -> Scored:
    """Train PEFT's adapter and a new head, as PEFT's examples of classification do, in fp32.

    Rank, alpha, modules, steps, schedule and the rows of each step are those of the service's defaults.
    """
    found = []
    for rate in PEFT_RATES:
        model, encode = _new_classifier(base, len(data.question.options))
        _train(model, encode, data.train, rate)
        validation = _logits(model, encode, data.validation)
        loss = log_loss(validation.tolist(), _answers(data.validation), 1.0)
        say(f"  PEFT at {rate:.2g}: {loss:.3f} nats on validation rows")
        found.append((loss, rate, model, encode, validation))
    _, rate, model, encode, validation = min(found, key=lambda one: one[0])
    return _calibrated(validation, _logits(model, encode, data.test), data, f"rate {rate:.2g}")


_Encode = Callable[[Sequence[Labelled]], Mapping[str, torch.Tensor]]


def _new_classifier(base: Path, num_options: int) -> tuple[_Classifier, _Encode]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    lora = LoraSpec()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_options, dtype=torch.float32)
    whole.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(
        task_type="SEQ_CLS", r=lora.rank, lora_alpha=round(lora.alpha), target_modules=list(lora.target_modules)
    )
    model = cast("_Classifier", cast("Callable[..., object]", get_peft_model)(whole, config))

    def encode(rows: Sequence[Labelled]) -> Mapping[str, torch.Tensor]:
        texts = [row.text for row in rows]
        found = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return model, encode


def _train(model: _Classifier, encode: _Encode, rows: Sequence[Labelled], rate: float) -> None:
    spec = TrainingSpec().with_epochs(len(rows))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=spec.weight_decay, fused=True)
    model.train()
    per_epoch, num_steps = spec.steps_per_epoch(len(rows)), spec.total_steps(len(rows))
    for step in range(num_steps):
        epoch, place = divmod(step, per_epoch)
        order = shuffled(len(rows), spec.seed, epoch)[place * spec.batch_size : (place + 1) * spec.batch_size]
        batch = [rows[index] for index in order]
        logits = model(**encode(batch)).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(_answers(batch)))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, spec.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, rate, spec.schedule, spec.warmup_ratio)
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def _logits(model: _Classifier, encode: _Encode, rows: Sequence[Labelled]) -> npt.NDArray[np.float64]:
    """Return the logits, in batches of texts of similar lengths."""
    model.train(mode=False)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].text))
    found: dict[int, list[float]] = {}
    for start in range(0, len(rows), MEASURED_AT_ONCE):
        batch = order[start : start + MEASURED_AT_ONCE]
        logits = model(**encode([rows[index] for index in batch])).logits
        found |= dict(zip(batch, logits.double().tolist(), strict=True))
    return np.array([found[index] for index in range(len(rows))])


def _calibrated(
    validation: npt.NDArray[np.float64], test: npt.NDArray[np.float64], data: DataSet, settings: str
) -> Scored:
    """Return test rows' scores with the temperature that suits the validation rows, as the service fits it."""
    return Scored(test, fit_temperature(validation, _answers(data.validation)), settings)


def _answers(rows: Sequence[Labelled]) -> list[int]:
    return [row.answer for row in rows]

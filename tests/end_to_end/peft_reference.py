"""Reference for served answers: transformers and PEFT on the same weights, mostly in fp32, in this process.

It imports nothing of the product: adapters are made, trained, saved and loaded by PEFT, and blends are dense sums
computed from PEFT's files.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tests.kits.oracles.hugging_face import linear, load_reference, logits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Generated:
    """A greedy answer: its text without special tokens, its token ids and each step's logits (tokens, vocab)."""

    text: str
    token_ids: tuple[int, ...]
    logits: torch.Tensor


class _Generates(Protocol):
    """The interface of transformers' models, which it leaves untyped."""

    def generate(self, **options: object) -> GenerateDecoderOnlyOutput: ...


class _Output(Protocol):
    logits: torch.Tensor


class _Calls(Protocol):
    """The same for a forward pass."""

    def __call__(self, **options: object) -> _Output: ...


class Reference:
    """The base in transformers. Adapters are active only inside a `with`."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self._model = load_reference(directory, dtype)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, padding_side="left")

    def greedy(self, prompts: Sequence[str], max_tokens: int) -> list[Generated]:
        """Return the likeliest continuation of each prompt, until the end token or `max_tokens`, computed in one
        batch."""
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        with torch.inference_mode(), _quiet():
            out = cast("_Generates", self._model).generate(
                **batch,
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert out.logits is not None
        logits = torch.stack(out.logits, dim=1)  # (prompts, tokens, vocab)
        new_ids = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
        return [self._generated(ids, rows) for ids, rows in zip(new_ids, logits, strict=True)]

    def texts(self, prompts: Sequence[str], max_tokens: int, guesses: Sequence[str] = ()) -> list[str]:
        """Return the texts of `greedy`. If `guesses` are right, one forward pass over each confirms it without
        decoding."""
        if len(guesses) == len(prompts) and all(map(self.is_greedy, prompts, guesses, repeat(max_tokens))):
            return list(guesses)
        return [answer.text for answer in self.greedy(prompts, max_tokens)]

    def is_greedy(self, prompt: str, answer: str, max_tokens: int) -> bool:
        """Return whether the answer is greedy, by teacher forcing: each token is the likeliest, and a short answer
        ends."""
        prompt_ids, token_ids = (self.tokenizer.encode(text) for text in (prompt, answer))
        rows = logits(self._model, (*prompt_ids, *token_ids))[len(prompt_ids) - 1 :]
        likeliest = rows.argmax(-1).tolist()
        if len(token_ids) < max_tokens:
            token_ids.append(self.tokenizer.eos_token_id)
        return likeliest[: len(token_ids)] == token_ids and len(token_ids) <= max_tokens

    def logprobs(self, prompt: str, answer: Sequence[int]) -> torch.Tensor:
        """Return (tokens, vocab) in nats: the distribution before each token of the answer, given the tokens
        before it."""
        prompt_ids = self.tokenizer.encode(prompt)
        rows = logits(self._model, (*prompt_ids, *answer))[len(prompt_ids) - 1 : -1]
        return rows.double().log_softmax(-1)

    def scores(self, prompt_ids: Sequence[int], continuations: Iterable[Sequence[int]]) -> list[float]:
        """Return the log-probability, in nats, of each continuation of the prompt. The prompt is computed once."""
        call = cast("_Calls", self._model)
        found = []
        with torch.inference_mode():
            cache = DynamicCache(config=self._model.config)
            first = call(input_ids=torch.tensor([list(prompt_ids)]), cache=cache, logits_to_keep=1)
            for one in continuations:
                rows = [first.logits[0]]
                if len(one) > 1:
                    after = call(input_ids=torch.tensor([list(one[:-1])]), cache=cache)
                    rows.append(after.logits[0])
                    cache.crop(1 - len(one))
                logprobs = torch.cat(rows).double().log_softmax(-1)  # (tokens, vocab)
                found.append(sum(float(row[token_id]) for row, token_id in zip(logprobs, one, strict=True)))
        return found

    def make_adapter(self, directory: Path, config: LoraConfig, seed: int) -> Path:
        """Save a random adapter, with B not zero, with PEFT; return `directory`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with self.new_adapter(config) as tuned:
                self.save(tuned, directory)
        return directory

    def save(self, tuned: PeftModel, directory: Path) -> None:
        """Save the model as PEFT does."""
        with _quiet():
            tuned.save_pretrained(str(directory))

    @contextmanager
    def new_adapter(self, config: LoraConfig) -> Iterator[PeftModel]:
        """Yield the model with a new adapter of `config`."""
        with _quiet():
            tuned = get_peft_model(self._model, config)
        try:
            yield tuned
        finally:
            tuned.unload()

    @contextmanager
    def adapter(self, directory: Path) -> Iterator[None]:
        """Apply the adapter that PEFT loads from `directory` during the block; a warning of PEFT is an error."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            tuned = PeftModel.from_pretrained(self._model, str(directory)).eval()
        try:
            yield
        finally:
            tuned.unload()

    @contextmanager
    def blend(self, parts: Iterable[tuple[Path, float]]) -> Iterator[None]:
        """Use weights W + Σ weight · alpha/r · B A, summed in fp64, during the block. Needs a reference in
        fp32."""
        kept: dict[str, torch.Tensor] = {}
        for directory, weight in parts:
            for path, delta in _deltas(directory):
                parameter = linear(self._model, path).weight
                kept.setdefault(path, parameter.data)
                parameter.data = parameter.data.double() + weight * delta
        for path in kept:
            parameter = linear(self._model, path).weight
            parameter.data = parameter.data.float()
        try:
            yield
        finally:
            for path, weights in kept.items():
                linear(self._model, path).weight.data = weights

    def _generated(self, token_ids: list[int], logits: torch.Tensor) -> Generated:
        end = self.tokenizer.eos_token_id
        if end in token_ids:
            token_ids = token_ids[: token_ids.index(end) + 1]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return Generated(text, tuple(token_ids), logits[: len(token_ids)])


def _deltas(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each target module's path and alpha/r · B A in fp64, for an adapter without patterns."""
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(directory / WEIGHTS)
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            path = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            rank = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
            yield path, config["lora_alpha"] / rank * (b.double() @ a.double())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' warnings about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""transformers and PEFT with the same weights, prompts and threads, in a process of their own.

PEFT runs in its fastest unmerged configuration: bf16 adapters (`autocast_adapter_dtype=False`), batches without
padding, no end token, `adapter_names=` for batches of several adapters. Loads that it doesn't support, such as a
different blend for each row, are left out. Tokenizing and detokenizing are timed, as for our server.
"""

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import logging as transformers_logging

from benchmarks.allocation import described, keeps_freed_memory
from benchmarks.machine import peak_rss
from benchmarks.measure import Run, differences, join
from benchmarks.serving.systems.systems import BLENDS, Facts, Load, Streams
from benchmarks.serving.systems.wires import Request
from server.system.memory import keep_freed_memory

NAME = "transformers + PEFT"


@dataclass(frozen=True)
class PeerConfig:
    base: Path  # a Hugging Face directory
    dtype: torch.dtype
    device: str
    threads: int


@dataclass(frozen=True)
class Generate:
    """A batch: without adapters, with one for all rows, or with one for each row."""

    prompts: tuple[str, ...]
    adapters: str | tuple[str, ...] | None
    max_tokens: int


@dataclass(frozen=True)
class LoadAdapter:
    """Load an adapter; unload it again unless `keep`."""

    name: str
    directory: Path
    keep: bool


class TransformersPeft:
    """A running peer process."""

    def __init__(self, config: PeerConfig, adapters: Mapping[str, Path]) -> None:
        """Start it. `adapters` are PEFT directories by the names that requests use."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(config, theirs), daemon=True)
        self._process.start()
        theirs.close()
        kept = bool(self._call(None))
        for name, directory in adapters.items():
            self.load_adapter(name, directory, keep=True)
        versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "peft", "torch"))
        settings = f"adapters in bf16, no padding, two copies of the base, {described(kept)}"
        self.facts = Facts(NAME, versions, False, settings, {})

    @property
    def peak_rss(self) -> int:
        return peak_rss(self._process.pid or 0)

    def can(self, load: Load) -> bool:
        """Return whether it supports the load. It can't blend adapters by request."""
        return load.kind != BLENDS

    def run(self, streams: Streams) -> Run:
        """Run the streams in batches, first all first requests, then all second ones: it has no queue."""
        batches = list(zip(*streams, strict=True))
        runs = [self._batch(batch) for batch in batches]
        whole = join(runs)
        # The texts are ordered by batch; return them ordered by stream.
        texts = [whole.texts[index :: len(streams)] for index in range(len(streams))]
        return replace(whole, texts=tuple(text for stream in texts for text in stream))

    def load_adapter(self, name: str, directory: Path, *, keep: bool = False) -> float:
        """Return the seconds that `load_adapter` took."""
        seconds = self._call(LoadAdapter(name, directory, keep))
        assert isinstance(seconds, float)
        return seconds

    def stop(self) -> None:
        self._call("stop")
        self._process.join()
        self._connection.close()

    def _batch(self, requests: Sequence[Request]) -> Run:
        names = [request.parts[0].name for request in requests if request.parts]
        together = None if not names else names[0] if len(set(names)) == 1 else tuple(names)
        prompts = tuple(request.prompt for request in requests)
        run = self._call(Generate(prompts, together, requests[0].max_tokens))
        assert isinstance(run, Run)
        return run

    def _call(self, command: object) -> object:
        with suppress(BrokenPipeError):  # the reason of the failure can still be received
            self._connection.send(command)
        try:
            answer: object = self._connection.recv()
        except EOFError:
            raise RuntimeError("the peer's process died") from None
        if isinstance(answer, str):
            raise RuntimeError(f"the peer failed:\n{answer}")
        return answer


class _Clock(StoppingCriteria):
    """A criterion that never stops and records when each token of the batch was generated."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Model(Protocol):
    """The parts used of transformers' models and of PEFT's wrappers."""

    def generate(self, **arguments: object) -> torch.Tensor: ...


class _PeftModel(_Model, Protocol):
    def load_adapter(self, model_id: Path, adapter_name: str, **options: bool) -> object: ...
    def set_adapter(self, adapter_name: str) -> None: ...
    def delete_adapter(self, adapter_name: str) -> None: ...


class _PeerModels:
    """Two copies of the base: a plain one, and one that PEFT wraps once the first adapter is loaded."""

    def __init__(self, config: PeerConfig) -> None:
        warnings.simplefilter("ignore")
        keep_freed_memory()  # as our server does
        torch.set_num_threads(config.threads)
        for quiet in (transformers_logging.set_verbosity_error, transformers_logging.disable_progress_bar):
            cast("Callable[[], None]", quiet)()
        self._config = config
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.base)
        self._plain = cast(_Model, self._load())
        self._peft: _PeftModel | None = None

    def generate(self, command: Generate) -> Run:
        model: _Model = self._plain
        extra: dict[str, object] = {}
        if command.adapters is not None:
            assert self._peft is not None, "no adapter was loaded"
            model = self._peft
            if isinstance(command.adapters, str):
                self._peft.set_adapter(command.adapters)
            else:
                extra["adapter_names"] = list(command.adapters)
        return self._batch(model, command.prompts, command.max_tokens, extra)

    def load_adapter(self, command: LoadAdapter) -> float:
        if self._peft is None:
            from peft import PeftModel

            base = self._load()
            started = time.perf_counter()
            wrapped = PeftModel.from_pretrained(
                base, command.directory, command.name, autocast_adapter_dtype=False
            )
            seconds = time.perf_counter() - started
            self._peft = cast(_PeftModel, wrapped.requires_grad_(False).train(False))
            return seconds
        started = time.perf_counter()
        self._peft.load_adapter(command.directory, command.name, autocast_adapter_dtype=False)
        seconds = time.perf_counter() - started
        if not command.keep:
            self._peft.delete_adapter(command.name)
        return seconds

    def _load(self) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self._config.base, dtype=self._config.dtype)
        model.generation_config.eos_token_id = None  # every answer has its full length
        model.generation_config.pad_token_id = 0
        module: torch.nn.Module = model
        return module.to(self._config.device).eval()

    @torch.inference_mode()
    def _batch(self, model: _Model, prompts: Sequence[str], max_tokens: int, extra: dict[str, object]) -> Run:
        clock = _Clock()
        started = time.perf_counter()
        inputs = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self._config.device)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_tokens,
            do_sample=False,
            stopping_criteria=[clock],
            **extra,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        seconds = time.perf_counter() - started
        first = (clock.times[0] - started,) * len(prompts)
        return Run(new.numel(), seconds, first, tuple(differences(clock.times)), tuple(texts))


def _serve(config: PeerConfig, connection: Connection) -> None:
    """Run the child: receive commands, send results; a string is a failure."""
    models: _PeerModels | None = None
    while True:
        command: object = connection.recv()
        result: object
        try:
            if models is None:
                models = _PeerModels(config)
                result = keeps_freed_memory()
            elif isinstance(command, Generate):
                result = models.generate(command)
            elif isinstance(command, LoadAdapter):
                result = models.load_adapter(command)
            else:
                result = True
        except Exception:
            result = traceback.format_exc()
        connection.send(result)
        if isinstance(result, str) or command == "stop":
            return

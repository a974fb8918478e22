"""Decisions by transformers + PEFT in batches: the log-probability of each option after its prompt.

Two ways, both without any other cache: whole rows of prompt and option in one padded batch, and the prompts first,
whose keys and values are then repeated for all options. In the second way, the common prefix of questions about
one input is computed once.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from transformers import AutoModelForCausalLM, DynamicCache

Ids = Sequence[int]


class _Output(Protocol):
    logits: torch.Tensor


class _Model(Protocol):
    def __call__(self, **inputs: object) -> _Output: ...


class Peer:
    """A model with one adapter. Adapters have the model's type, which is fastest."""

    def __init__(self, base: Path, adapter: Path, dtype: torch.dtype) -> None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            wrapped = PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False)
        self._config = plain.config
        self._model = cast("_Model", wrapped.requires_grad_(requires_grad=False).eval())

    @torch.inference_mode()
    def whole_rows(self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Return the score of each option after each prompt, from one batch of whole rows."""
        rows = [
            (prompt, option) for prompt, of_prompt in zip(prompts, options, strict=True) for option in of_prompt
        ]
        token_ids, mask = _left_padded([[*prompt, *option[:-1]] for prompt, option in rows])
        longest = max(len(option) for _, option in rows)
        output = self._model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=_positions(mask),
            logits_to_keep=longest,
            use_cache=False,
        )
        logprobs = output.logits.float().log_softmax(-1)
        scores = iter(
            float(found[longest - len(option) :].gather(1, torch.tensor(option)[:, None]).sum())
            for found, (_, option) in zip(logprobs, rows, strict=True)
        )
        return [[next(scores) for _ in of_prompt] for of_prompt in options]

    @torch.inference_mode()
    def prompts_first(
        self, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]], num_shared: int = 0
    ) -> list[list[float]]:
        """Return the same. The first `num_shared` tokens, which are common to all prompts, are computed once.

        All prompts have equally many options.
        """
        cache = DynamicCache(config=self._config)
        num_prompts, num_options = len(prompts), len(options[0])
        mask = torch.ones(num_prompts, num_shared, dtype=torch.long)
        if num_shared:
            shared = torch.tensor([list(prompts[0][:num_shared])])
            self._model(input_ids=shared, cache=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(num_prompts)
        token_ids, rest = _left_padded([prompt[num_shared:] for prompt in prompts])
        mask = torch.cat([mask, rest], dim=1)
        positions = _positions(mask)[:, num_shared:]
        first = self._model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits.float()  # (prompts, 1, vocabulary)
        rows = [option for of_prompt in options for option in of_prompt]
        firsts = first[:, 0].log_softmax(-1).repeat_interleave(num_options, 0)
        found = firsts.gather(1, torch.tensor([option[0] for option in rows])[:, None])[:, 0]
        longest = max(map(len, rows)) - 1
        if longest:
            cache.batch_repeat_interleave(num_options)
            padded = torch.tensor([[*option[:-1], *[0] * (longest + 1 - len(option))] for option in rows])
            after = torch.tensor([[1] * (len(option) - 1) + [0] * (longest + 1 - len(option)) for option in rows])
            mask = torch.cat([mask.repeat_interleave(num_options, 0), after], dim=1)
            logits = self._model(
                input_ids=padded,
                attention_mask=mask,
                position_ids=_positions(mask)[:, -longest:],
                cache=cache,
                use_cache=True,
            ).logits.float()  # (prompts · options, longest, vocabulary)
            wanted = torch.tensor([[*option[1:], *[0] * (longest + 1 - len(option))] for option in rows])
            found = found + (logits.log_softmax(-1).gather(2, wanted[:, :, None])[:, :, 0] * after).sum(1)
        return found.reshape(num_prompts, num_options).tolist()


def _left_padded(rows: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both (rows, longest)."""
    longest = max(map(len, rows))
    token_ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return token_ids, mask


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token, counted without padding: (rows, tokens)."""
    return (mask.cumsum(1) - 1).clamp(min=0)

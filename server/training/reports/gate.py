"""Whether a trained adapter is good enough to be published, and why not."""

from dataclasses import dataclass

from server.training.loop.evaluate import Evaluation
from server.training.spec import Method, PublishIf


@dataclass(frozen=True)
class Gate:
    """The decision on `publish_if`. `reason` is a sentence for whoever reads the report."""

    publish_if: PublishIf
    passes: bool
    reason: str


def decide(
    publish_if: PublishIf,
    tuned: Evaluation | None,
    base: Evaluation | None,
    latest: Evaluation | None = None,
    method: Method = "lora",
) -> Gate:
    """Hold the tuned adapter to the base's loss, or to that of the name's latest version, if there is one.

    All on the same held-out rows; a loss must be lower, not equal. Only "always" does without evaluations, for
    which it raises ValueError. What is fully fine-tuned is never published.
    """
    if method == "full":
        return Gate(publish_if, False, "a fully fine-tuned model is kept with its job, but it is no adapter")
    if publish_if == "always":
        return Gate(publish_if, True, "published whatever its loss is")
    other, name = (base, "the base's") if publish_if == "improves_base" or latest is None else (latest, "latest's")
    if tuned is None or other is None:
        raise ValueError(f"{publish_if} needs held-out rows")
    passes = tuned.loss < other.loss
    verb = "is" if passes else "is not"
    return Gate(publish_if, passes, f"its loss of {tuned.loss:.4f} {verb} below {name}, {other.loss:.4f}")

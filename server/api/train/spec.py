"""From the body of POST /train to the job's specification: defaults filled in, names resolved to one version.

What the rows decide is `server.api.train.submission`'s part.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

from adapters import recorded
from adapters.catalog.catalog import Part
from adapters.errors import FieldError, InvalidInput
from adapters.expression import Term, parse
from adapters.library import Library
from adapters.names import alias_fault
from adapters.peft.files import PeftAdapter
from adapters.pinned import Pinned
from server.api.train.schemas import MAX_TRAINED_RANK, TrainBody
from server.training.spec import LEARNING_RATES, JobSpec, LoraSpec, TrainingSpec

MAX_PARENT_RANK = 2 * MAX_TRAINED_RANK
"""pissa and olora publish twice the rank that they train, and what they publish can be trained on."""


def parent_terms(body: TrainBody, base_name: str) -> tuple[Term, ...]:
    """The one adapter to go on from, as it is named; none for the base. Raises InvalidInput."""
    text = body.start_from
    if text is None or text == base_name:
        return ()
    terms = parse(text, "start_from")
    if len(terms) > 1 or any(term.weight != 1 for term in terms):
        raise InvalidInput.of("start_from", "names one adapter, without a weight")
    return terms


def build_spec(body: TrainBody, library: Library, pinned: Pinned, max_length: int) -> JobSpec:
    """The specification; `pinned` is the parent, or nothing. `max_length` is what the base can read.

    Raises InvalidInput naming every field at fault, or of the parent NotFound or CorruptAdapter.
    """
    faults = [*_name_faults(body.name, library), *_faults(body, max_length)]
    lora = LoraSpec(**body.lora.model_dump())
    parent = pinned.parts[0] if pinned.parts else None
    if any(part != parent or part.weight != 1 for part in pinned.parts):
        message = "is a composition: merge it into an adapter first, by a method of POST /compositions"
        faults.append(FieldError(("start_from",), message))
    elif parent is not None:
        adapter = library.read(parent.digest)
        if (rank := adapter.weights.max_rank) > MAX_PARENT_RANK:
            message = (
                f"has a rank of {rank}, and training goes on from {MAX_PARENT_RANK} at most: merge it into one of "
                "a smaller rank first, by POST /compositions with method svd and a rank"
            )
            faults.append(FieldError(("start_from",), message))
        asked, lora = lora, _shaped(lora, library, parent, adapter)
        faults += _contradictions(asked, lora, body.lora.model_fields_set)
    if faults:
        raise InvalidInput(faults)
    rate = body.training.learning_rate
    training = TrainingSpec(
        **body.training.model_dump(exclude={"learning_rate"}),
        learning_rate=LEARNING_RATES[body.method] if rate is None else rate,
    )
    return JobSpec(
        name=body.name,
        method=body.method,
        lora=lora,
        training=training,
        start_from=None if parent is None else f"{parent.name}@{parent.version}",
        start_from_digest=None if parent is None else parent.digest,
        publish_if=body.publish_if,
        alias=body.alias,
        description=body.description,
    )


def _name_faults(name: str, library: Library) -> Sequence[FieldError]:
    try:
        library.check_name(name)
    except InvalidInput as error:
        return error.errors
    return ()


def _faults(body: TrainBody, max_length: int) -> Iterator[FieldError]:
    training = body.training
    if (body.data is None) == (body.dataset is None):
        for name in ("data", "dataset"):
            yield FieldError((name,), "give exactly one of data and dataset")
    if training.max_length > max_length:
        yield FieldError(("training", "max_length"), f"the base reads at most {max_length} tokens")
    if training.early_stopping_patience is not None and training.eval_steps is None:
        message = "counts evaluations: set training.eval_steps"
        yield FieldError(("training", "early_stopping_patience"), message)
    if body.alias is not None and (fault := alias_fault(body.alias)):
        yield FieldError(("alias",), fault)
    if "\0" in body.description:
        yield FieldError(("description",), "must not have NUL characters")
    if body.method == "full":
        if body.lora.model_fields_set:
            yield FieldError(("lora",), "full fine-tuning trains no adapter: leave it out, or set method to lora")
        if body.publish_if != "always":
            message = "full fine-tuning publishes no version that it could hold back: leave it out"
            yield FieldError(("publish_if",), message)
        if body.alias is not None:
            yield FieldError(("alias",), "full fine-tuning publishes no version that it could point to")
        if body.start_from is not None:
            yield FieldError(("start_from",), "full fine-tuning goes on from no adapter")


def _shaped(lora: LoraSpec, library: Library, parent: Part, stored: PeftAdapter) -> LoraSpec:
    """With the parent's shape, which training leaves as it is. Raises NotFound."""
    version = library.version(parent.name, parent.version)
    config = recorded.config_of(version, stored, library.shape.num_layers)
    return dataclasses.replace(
        lora,
        rank=config.rank,
        alpha=float(config.alpha),
        target_modules=stored.weights.target_modules,
        use_rslora=config.use_rslora,
    )


def _contradictions(asked: LoraSpec, shaped: LoraSpec, given: Collection[str]) -> Iterator[FieldError]:
    """What was given and can't be had: an adapter keeps its shape, and training goes on from where it ended."""
    if "init" in given:
        yield FieldError(("lora", "init"), "is for a new adapter, and start_from has begun: leave it out")
    for name in given:
        if (value := getattr(shaped, name)) != getattr(asked, name):
            shown = ", ".join(value) if isinstance(value, tuple) else value
            yield FieldError(("lora", name), f"is that of start_from, {shown}: leave it out")

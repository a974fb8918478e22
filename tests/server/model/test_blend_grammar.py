"""Any expression of the grammar, inline or as a named composition, equals the dense W + Σ wᵢ sᵢ Bᵢ Aᵢ in one
batch.

The tests go from the text to the logits: parsing, resolution by a real catalog, the canonical form, and a batch
with other rows. The reference sums the decimals from which the texts were made, and merges the result into
transformers' own model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from adapters.catalog.catalog import Catalog, combine
from adapters.errors import InvalidInput
from adapters.expression import parse
from adapters.lora import LoraWeights
from server.database import connect
from server.model.base.weights import BaseModel
from server.model.lora_batch import Parts
from server.model.rank_rows import Placement, RankRows, RowFormat
from server.model.smollm import SmolLM
from tests.kits.engines import place, random_adapter
from tests.kits.oracles.hugging_face import load_reference, logits, merged
from tests.kits.paged import paged_logits
from tests.kits.properties import num_examples

NUM_TOKENS = 12
REFERENCES: dict[str, int] = {
    "wide": 1,
    "wide@1": 0,
    "wide@2": 1,
    "wide@latest": 1,
    "wide@prod": 0,
    "one.rank": 2,
    "Again": 0,  # the bytes of wide@1 under another name
    "q-v": 3,
    "q-v@1": 3,
    "mixed_ranks": 4,
    "9th@best": 5,
    "9th": 5,
}
"""What a term may name, and the adapter of `library` that it means."""
MIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "mix": (("wide@prod", "0.5"), ("q-v", "-0.75"), ("mixed_ranks", "1.25")),
    "mix-of-mix": (("mix", "0.2"), ("one.rank", "1"), ("wide@1", "-0.1")),
}
"""Compositions that exist from the start."""


@dataclass(frozen=True)
class Written:
    """An expression and its meaning: exact weights by adapter."""

    text: str
    weights: dict[int, Decimal]


@dataclass(frozen=True)
class World:
    """The adapters in a catalog, in the pools, and as weights."""

    catalog: Catalog
    adapters: Sequence[LoraWeights]
    placements: dict[str, Placement]
    rows: RankRows
    model: SmolLM
    reference: PreTrainedModel

    def parts(self, text: str) -> Parts:
        """Return the parts that a request for this expression would use."""
        resolved = self.catalog.resolve(parse(text))
        return tuple((self.placements[digest], weight) for digest, weight in combine(resolved))


def library(base: BaseModel) -> list[LoraWeights]:
    """Return adapters of mixed ranks, targets, layers and scalings."""
    shape, last = base.config.shape, base.config.num_layers - 1
    return [
        random_adapter(shape, 10, rank=8, strength=0.1),
        random_adapter(shape, 11, rank=16, strength=0.1),
        random_adapter(shape, 12, rank=1, strength=0.1),
        random_adapter(shape, 13, rank=4, modules=["q_proj", "v_proj"], strength=0.1),
        random_adapter(shape, 14, rank=lambda key: 1 + (3 * key.layer + len(key.module)) % 9, strength=0.1),
        random_adapter(shape, 15, rank=32, modules=["down_proj", "k_proj"], layers=[0, last], strength=0.1),
    ]


@pytest.fixture(scope="module")
def world(tiny_base: BaseModel, tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    adapters = library(tiny_base)
    catalog = Catalog(connect(tmp_path_factory.mktemp("catalog")))
    versions = [
        ("wide", 0),
        ("wide", 1),
        ("one.rank", 2),
        ("Again", 0),
        ("q-v", 3),
        ("mixed_ranks", 4),
        ("9th", 5),
    ]
    for name, number in versions:
        weights = adapters[number]
        catalog.publish(
            name,
            digest=weights.digest,
            rank=weights.max_rank,
            alpha=1.0,
            target_modules=weights.target_modules,
            parameters=weights.num_parameters,
            bytes=1,
        )
    catalog.point("wide", "prod", 1)
    catalog.point("9th", "best", 1)
    for name, terms in MIXES.items():
        catalog.compose(name, parse("+".join(f"{reference}*{weight}" for reference, weight in terms)))
    rows = RankRows(
        tiny_base.config.shape,
        max_rank=96,
        row_format=RowFormat.of_torch(torch.float32, tiny_base.device),
        device=tiny_base.device,
    )
    placements = place(rows, adapters)
    return World(
        catalog=catalog,
        adapters=adapters,
        placements={weights.digest: placement for weights, placement in zip(adapters, placements, strict=True)},
        rows=rows,
        model=SmolLM(tiny_base.config, tiny_base.weights, max_positions=64),
        reference=load_reference(tiny_base_dir),
    )


def meaning(reference: str) -> dict[int, Decimal]:
    """Return the adapters that a term's reference means, with their weights."""
    if reference in REFERENCES:
        return {REFERENCES[reference]: Decimal(1)}
    total: dict[int, Decimal] = {}
    for part, weight in MIXES[reference.partition("@")[0]]:
        for number, inner in meaning(part).items():
            total[number] = total.get(number, Decimal(0)) + inner * Decimal(weight)
    return total


@st.composite
def expressions(draw: st.DrawFn) -> Written:
    """Generate any expression: 1 to 16 parts, repeated or not, weights of every form, with blanks."""
    references = st.sampled_from([*REFERENCES, *MIXES, "mix@1", "mix@latest"])
    blank = st.sampled_from(["", "", " ", "  "])
    weights = st.one_of(
        st.none(),
        st.sampled_from(["0", "1", "-1", ".25", "-.5", "0.0"]),
        st.decimals(-1, 1, places=3, allow_nan=False).map(lambda value: f"{value:f}"),
    )
    total: dict[int, Decimal] = {}
    texts = []
    for _ in range(draw(st.integers(1, 16))):
        reference, weight = draw(references), draw(weights)
        for number, inner in meaning(reference).items():
            total[number] = total.get(number, Decimal(0)) + inner * Decimal(weight or 1)
        texts.append(reference if weight is None else f"{reference}{draw(blank)}*{draw(blank)}{weight}")
    text = texts[0] + "".join(f"{draw(blank)}+{draw(blank)}{term}" for term in texts[1:])
    return Written(text, {number: weight for number, weight in total.items() if weight})


numbers = count()


@settings(
    max_examples=num_examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=st.lists(expressions(), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_served_is_dense_and_named_is_inline(world: World, batch: list[Written], seed: int) -> None:
    token_ids = [[(7 * i + 31 * n + seed) % 512 for i in range(NUM_TOKENS)] for n in range(len(batch))]
    parts = [world.parts(written.text) for written in batch]
    for written, inline in zip(batch, parts, strict=True):
        by_digest = {world.adapters[number].digest: float(weight) for number, weight in written.weights.items()}
        assert sorted(dict_of(world, inline).items()) == sorted(by_digest.items()), written.text
        assert named(world, written) == inline, written.text
    found = paged_logits(world.model, token_ids, seed=seed, rows=world.rows, parts=parts, num_prompt_tokens=4)
    for written, ids, ours in zip(batch, token_ids, found, strict=True):
        blend = [(world.adapters[number], float(weight)) for number, weight in written.weights.items()]
        with merged(world.reference, blend) as model:
            exact = logits(model, ids)
        assert (ours - exact).abs().max() <= 1e-3 * (1 + float(exact.abs().max())), written.text


def dict_of(world: World, parts: Parts) -> dict[str, float]:
    digests = {id(placement): digest for digest, placement in world.placements.items()}
    return {digests[id(placement)]: weight for placement, weight in parts}


def named(world: World, written: Written) -> Parts:
    """Store the expression as a composition; return the expression that names it."""
    name = f"named-{next(numbers)}"
    if not written.weights:
        with pytest.raises(InvalidInput, match="is equal to the base"):
            world.catalog.compose(name, parse(written.text))
        return ()
    world.catalog.compose(name, parse(written.text))
    return world.parts(name)


def test_a_blend_shows(world: World) -> None:
    """The comparison above can fail: blends differ from the base, and from blends with one wrong weight."""
    ids = list(range(NUM_TOKENS))
    plain = logits(world.reference, ids)
    with merged(world.reference, [(world.adapters[0], 0.7), (world.adapters[3], -0.3)]) as model:
        exact = logits(model, ids)
    texts = ["wide@1*0.7+q-v*-0.3", "wide@1*0.7+q-v*-0.33", "wide@1*0.7", "wide@2*0.7+q-v*-0.3"]
    found = paged_logits(
        world.model, [ids] * len(texts), rows=world.rows, parts=[world.parts(text) for text in texts]
    )
    tolerance = 1e-3 * (1 + float(exact.abs().max()))
    off = [float((ours - exact).abs().max()) for ours in found]
    assert off[0] <= tolerance
    assert min(*off[1:], float((plain - exact).abs().max())) > tolerance

"""Compare the targeted modules with PEFT's own functions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters.lora import MODULES, ModuleKey
from adapters.peft.targets import (
    BadPatternError,
    BadTargetsError,
    Budget,
    Pattern,
    Targeting,
    find,
    linear_modules,
    other_modules,
    pick,
    resolve,
)
from tests.adapters.oracle import NUM_LAYERS, shape_of, tiny_llama, tiny_smollm3
from tests.kits.properties import num_examples

BASE = shape_of(tiny_llama())
LINEAR = linear_modules(BASE)
ENDINGS = st.sampled_from([*MODULES, "0.self_attn.q_proj", "layers.1.mlp.up_proj", "proj", "k", *list(LINEAR)[:8]])
EXPRESSIONS = st.sampled_from(
    [
        r".*",
        r".*_proj",
        r".*\.(q|v)_proj",
        r"model\.layers\.[01]\..*proj",
        r"(?i).*\.UP_PROJ",
        r".*(?<!lm_head)",
        r"(?!.*mlp).*[qk]_proj",
        r"model\.layers\.(?P<idx>\d)\.self_attn\.o_proj",
        r".*self_attn",
        "q_proj",
    ]
)

PATTERNS = [
    r"[qk]_proj",
    r"layers\.[12]\.mlp.*",
    ".*",
    "^model.*up_proj",
    "(mlp|self_attn).[a-z]_proj",
    "o_proj$",
    "a.*",
]


def peft_says(targeting: Targeting) -> set[str]:
    """Return the paths that PEFT would adapt."""
    entries = targeting.target_modules
    config = PeftLoraConfig(target_modules=entries if isinstance(entries, str) else list(entries))
    excluded = targeting.exclude_modules
    config.exclude_modules = (excluded if isinstance(excluded, str) else list(excluded)) or None
    layers = targeting.layers_to_transform
    config.layers_to_transform = None if layers is None else list(layers)
    config.layers_pattern = list(targeting.layers_pattern) or None
    return {path for path in [*LINEAR, *other_modules(BASE)] if check_target_module_exists(config, path)}


def assert_as_peft(targeting: Targeting) -> None:
    expected = peft_says(targeting)
    if not expected or not expected <= set(LINEAR):
        with pytest.raises(BadTargetsError) as caught:
            resolve(targeting, BASE, Budget())
        assert caught.value.field == "target_modules"
    else:
        assert {key.path for key in resolve(targeting, BASE, Budget())} == expected


@given(
    targets=st.lists(ENDINGS, min_size=1, max_size=4).map(tuple),
    excluded=st.lists(ENDINGS, max_size=2).map(tuple),
    layers=st.none() | st.lists(st.integers(0, NUM_LAYERS), max_size=2).map(tuple),
    layers_pattern=st.lists(st.sampled_from(["layers", "h", "lay.rs", "model.layers"]), max_size=2).map(tuple),
)
@settings(deadline=None)
def test_lists_target_as_in_peft(
    targets: tuple[str, ...],
    excluded: tuple[str, ...],
    layers: tuple[int, ...] | None,
    layers_pattern: tuple[str, ...],
) -> None:
    assert_as_peft(Targeting(targets, excluded, layers, layers_pattern))


@given(targets=EXPRESSIONS, excluded=EXPRESSIONS | st.lists(ENDINGS, max_size=2).map(tuple))
@settings(max_examples=num_examples(25), deadline=None)
def test_expressions_target_as_in_peft(targets: str, excluded: str | tuple[str, ...]) -> None:
    assert_as_peft(Targeting(targets, excluded))


@given(st.dictionaries(ENDINGS | st.sampled_from(PATTERNS), st.integers(1, 99), max_size=4))
@settings(max_examples=num_examples(25), deadline=None)
def test_patterns_are_picked_as_in_peft(pattern: dict[str, int]) -> None:
    keys = list(LINEAR.values())
    expected = {key: pattern[name] for key in keys if (name := get_pattern_key([*pattern], key.path)) in pattern}
    assert pick("rank_pattern", pattern, keys, Budget()) == expected


def test_the_other_modules_are_those_of_the_real_models() -> None:
    for model in (tiny_llama(), tiny_smollm3()):
        assert {path for path, _ in model.named_modules()} == {"", *LINEAR, *other_modules(BASE)}


def test_all_linear() -> None:
    assert resolve(Targeting("All-Linear"), BASE, Budget()) == set(LINEAR.values())
    assert resolve(Targeting("all-linear", ("mlp.up_proj", *MODULES[:4])), BASE, Budget()) == {
        ModuleKey(layer, name) for layer in range(NUM_LAYERS) for name in ("gate_proj", "down_proj")
    }


@pytest.mark.parametrize(
    "targets", [("q_proj", "lm_head"), ("embed_tokens",), "model.*", ("self_attn",), ("norm",)]
)
def test_other_modules_are_refused(targets: str | tuple[str, ...]) -> None:
    with pytest.raises(BadTargetsError, match="only the linear modules of the layers"):
        resolve(Targeting(targets), BASE, Budget())


def test_ambiguous_targets_are_refused() -> None:
    with pytest.raises(BadTargetsError, match="is ambiguous in PEFT") as caught:
        resolve(Targeting(tuple(LINEAR), layers_to_transform=(0,)), BASE, Budget())
    assert caught.value.field == "layers_to_transform"


@pytest.mark.parametrize(
    ("targeting", "field"),
    [
        (Targeting("(unclosed"), "target_modules"),
        (Targeting("all-linear", "*"), "exclude_modules"),
        (Targeting(("q_proj",), layers_to_transform=(0,), layers_pattern=("(?P<idx>a)",)), "layers_pattern"),
        (Targeting(("q_proj",), layers_to_transform=(0,), layers_pattern=("x" * 9000,)), "layers_pattern"),
        (Targeting("(" * 4000 + ")" * 4000), "target_modules"),
    ],
)
def test_bad_expressions_are_refused(targeting: Targeting, field: str) -> None:
    with pytest.raises(BadTargetsError) as caught:
        resolve(targeting, BASE, Budget())
    assert caught.value.field == field


def test_an_endless_expression_is_interrupted() -> None:
    budget = Budget(0.1)
    with pytest.raises(BadPatternError, match="takes too much") as caught:
        find([Pattern("q_proj", "match", "q_proj"), Pattern("(.|.)*X", "match", "(.|.)*X")], list(LINEAR), budget)
    assert caught.value.index == 1


def test_a_budget_covers_all_calls() -> None:
    budget = Budget(1.0)
    for _ in range(2):
        before = budget.seconds
        find([Pattern("[q]_proj", "match", "[q]_proj")], list(LINEAR), budget)
        assert 0 < before - budget.seconds < 0.5
    find([Pattern("q_proj", "match", "q_proj")] * 100, list(LINEAR), budget)
    budget.seconds = 0.0
    find([Pattern("q_proj", "match", "q_proj")], list(LINEAR), budget)
    with pytest.raises(BadPatternError, match="takes too much") as caught:
        find([Pattern("(.|.)*X", "match", "(.|.)*X")], list(LINEAR), budget)
    assert caught.value.index == 0


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(BadPatternError, match="2000 entries"):
        find([Pattern("a", "match", "a")] * 2000, ["a"], Budget())


def test_plain_names_match_equally_in_both_processes() -> None:
    """One expression moves all patterns of a call to the other process; the results must not depend on that."""
    texts = ["q_proj", r"layers\.1\.mlp\.up_proj", "layers.1", "", "_proj"]
    patterns = [Pattern(rf"(.*\.)?({text})$", "match", text) for text in texts]
    patterns += [Pattern(rf".*?{text}\.(?P<idx>\d+)", "match", text) for text in ["layers", "x"]]
    here = find(patterns, list(LINEAR), Budget())
    there = find([*patterns, Pattern("[a]", "match", "[a]")], list(LINEAR), Budget())
    assert there[:-1] == here
    assert {row for row in here[0] if row is not None} == {""}
    assert set(here[5]) == {"0", "1", "2"}


def test_patterns_longer_than_every_name_are_skipped() -> None:
    """They cost nothing, however many there are. Escapes don't count towards the length."""
    longest = max(LINEAR, key=len)
    texts = [longest, longest.replace(".", r"\."), longest + "0", "." * len(longest), "." * (len(longest) + 1)]
    patterns = [Pattern(rf"(.*\.)?({text})$", "match", text) for text in texts]
    table = find(patterns, list(LINEAR), Budget())
    assert [row[list(LINEAR).index(longest)] for row in table] == ["", "", None, "", None]
    many = [Pattern(text, "match", text) for text in ("q" * 900 + str(number) for number in range(1000))]
    budget = Budget(seconds=0)  # the other process has no time left
    assert find(many, list(LINEAR), budget) == [[None] * len(LINEAR)] * 1000
    with pytest.raises(BadPatternError) as caught:
        find([*many, *patterns, Pattern("(.|.)*X", "match", "(.|.)*X")], list(LINEAR), Budget())
    assert caught.value.index == 1005

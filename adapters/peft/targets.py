"""Resolve which modules a PEFT configuration targets, and which rank and alpha each gets, exactly as PEFT does.

The rules are those of `check_target_module_exists`, `_maybe_include_all_linear_layers` and `get_pattern_key` in
PEFT 0.21, for the module names of Hugging Face's Llama and SmolLM3.

Configurations may have regular expressions, and an expression of a dozen characters can keep `re` busy for years.
Plain names are matched in this process if there are few of them. Other expressions are matched in a short-lived
process, which the kernel ends when the budget of processor time is used up. A budget of processor time, unlike one
of wall time, doesn't depend on the machine's load.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from adapters.lora import MODULES, BaseShape, ModuleKey

CPU_SECONDS = 0.5
WALL_SECONDS = 30.0  # enough for a busy machine
MAX_PATTERNS = 1024
MAX_PATTERN_LENGTH = 8192
MAX_MATCHED_HERE = 16_384  # characters in one call; PEFT's own patterns for a large base have half as many

# names and dots, which take one step per character to match
_PLAIN = re.compile(r"(?:[A-Za-z0-9_.-]|\\\.)*")

# Does the same as `_match_here`, prints a line for each pattern, and finally the processor time. SIGPROF ends it
# even in the middle of a match; so do limits of 1 GiB of memory and, once more, of processor time.
_MATCH_THERE = """
import json, re, resource, signal, sys, time
question = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, question["seconds"])
for limit, value in ((resource.RLIMIT_AS, 1 << 30), (resource.RLIMIT_CPU, 2)):
    try:
        resource.setrlimit(limit, (value, value))
    except (ValueError, OSError):  # a lower one holds already
        pass
for how, text in question["patterns"]:
    try:
        match = getattr(re.compile(text), how)
        found = [match(name) for name in question["names"]]
        row = [m and (m.groupdict().get("idx") or "") for m in found]
    except MemoryError:
        break
    except Exception as error:
        row = str(error) or type(error).__name__
    print(json.dumps(row), flush=True)
else:
    print(time.process_time(), flush=True)
"""


class BadPatternError(ValueError):
    """A regular expression that can't be used; `index` is its position among the given patterns."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and `how`: the method of `re.Pattern` that matches it with a module's name."""

    text: str
    how: Literal["match", "fullmatch"]
    user_text: str  # the part of `text` from the configuration


@dataclass
class Budget:
    """The processor time, in seconds, that remains for all patterns of one configuration."""

    seconds: float = CPU_SECONDS


def find(patterns: Sequence[Pattern], names: Sequence[str], budget: Budget) -> list[list[str | None]]:
    """Match each pattern (rows of the result) with each name (columns).

    An entry is None if the name doesn't match, else the text of the match's group `idx` ("" without such a group).
    Raise BadPatternError for the first pattern that doesn't compile, is too long, or exceeds the budget.
    """
    for index, pattern in enumerate(patterns):
        if index >= MAX_PATTERNS:
            raise BadPatternError(index, f"there are {len(patterns)} entries, the most is {MAX_PATTERNS}")
        if len(pattern.user_text) > MAX_PATTERN_LENGTH:
            raise BadPatternError(index, f"an entry has at most {MAX_PATTERN_LENGTH} characters")
    longest = max(map(len, names), default=0)
    fitting = [index for index, pattern in enumerate(patterns) if _min_length(pattern) <= longest]
    table: list[list[str | None]] = [[None] * len(names) for _ in patterns]
    try:
        rows = _match([patterns[index] for index in fitting], names, budget)
    except BadPatternError as error:
        raise BadPatternError(fitting[error.index], str(error)) from None
    for index, row in zip(fitting, rows, strict=True):
        table[index] = row
    return table


def _min_length(pattern: Pattern) -> int:
    """Return a lower bound for the lengths of matching names: a plain name's length, or 0 for other patterns."""
    text = pattern.user_text
    return len(text) - text.count("\\") if _PLAIN.fullmatch(text) else 0


def _match(patterns: Sequence[Pattern], names: Sequence[str], budget: Budget) -> list[list[str | None]]:
    is_short = sum(len(pattern.user_text) for pattern in patterns) <= MAX_MATCHED_HERE
    if not is_short or not all(_PLAIN.fullmatch(pattern.user_text) for pattern in patterns):
        return _match_there(patterns, names, budget)
    started = time.thread_time()
    table = [_match_here(pattern, names) for pattern in patterns]
    budget.seconds -= time.thread_time() - started
    return table


def _match_here(pattern: Pattern, names: Sequence[str]) -> list[str | None]:
    compiled = re.compile(pattern.text)
    match = compiled.match if pattern.how == "match" else compiled.fullmatch
    return [found and (found.groupdict().get("idx") or "") for found in map(match, names)]


def _match_there(patterns: Sequence[Pattern], names: Sequence[str], budget: Budget) -> list[list[str | None]]:
    question = {
        "seconds": max(budget.seconds, 0.001),
        "patterns": [(pattern.how, pattern.text) for pattern in patterns],
        "names": list(names),
    }
    try:
        process = subprocess.run(  # noqa: S603 the users' text goes in as data, never as an argument
            [sys.executable, "-I", "-S", "-c", _MATCH_THERE],
            input=json.dumps(question).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
            env={},  # keeps credentials of databases and buckets from it
        )
        output = process.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    *lines, _ = output.split(b"\n")  # an incomplete last line was cut off
    table: list[list[str | None]] = []
    for index, row in enumerate(map(json.loads, lines[: len(patterns)])):
        if isinstance(row, str):
            raise BadPatternError(index, f"is no regular expression that Python reads: {row}")
        table.append(row)
    if len(lines) <= len(patterns):
        message = f"takes too much: all expressions together have {CPU_SECONDS:g} s of a processor, and 1 GiB"
        raise BadPatternError(min(len(table), len(patterns) - 1), message)
    budget.seconds -= float(lines[-1])
    return table


ALL_LINEAR = "all-linear"
_Value = TypeVar("_Value")

# With this many entries, PEFT rewrites the list into shorter suffixes, to which layers_to_transform applies.
_PEFT_REWRITES_FROM = 20

_IN_EACH_LAYER = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm")
_OUTSIDE_LAYERS = ("model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


class BadTargetsError(ValueError):
    """Targets that can't be resolved; `field` is the configuration's key at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Targeting:
    """The keys of adapter_config.json that choose modules. A value that is a string is a regular expression.

    The string "all-linear" chooses all linear modules.
    """

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()


def linear_modules(base: BaseShape) -> dict[str, ModuleKey]:
    """Return the modules that an adapter may target, by path."""
    keys = (ModuleKey(layer, module) for layer in range(base.num_layers) for module in MODULES)
    return {key.path: key for key in keys}


def other_modules(base: BaseShape) -> tuple[str, ...]:
    """Return the paths of the base model's modules that `linear_modules` doesn't return.

    PEFT refuses these as targets, or doesn't adapt them with plain LoRA.
    """
    layers = (f"model.layers.{layer}{end}" for layer in range(base.num_layers) for end in _IN_EACH_LAYER)
    return (*_OUTSIDE_LAYERS, *layers)


def resolve(targeting: Targeting, base: BaseShape, budget: Budget) -> frozenset[ModuleKey]:
    """Return the targeted modules.

    Raise BadTargetsError if no module is targeted, or if a targeted module isn't linear or isn't in a layer.
    """
    linear = linear_modules(base)
    if isinstance(targeting.target_modules, str) and targeting.target_modules.lower() == ALL_LINEAR:
        # PEFT replaces it by the list of the linear modules' paths, without the output embedding
        hit = set(linear)
    else:
        hit = _targeted(targeting, [*linear, *other_modules(base)], budget)
    if targeting.exclude_modules:
        hit -= _listed("exclude_modules", targeting.exclude_modules, sorted(hit), budget)
    if strangers := sorted(hit - set(linear)):
        shown = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
        message = f"reaches {shown}: only the linear modules of the layers ({', '.join(MODULES)}) can be targeted"
        raise BadTargetsError("target_modules", message)
    if not hit:
        raise BadTargetsError("target_modules", "matches no linear module of this base")
    return frozenset(linear[path] for path in hit)


def pick(
    field: str, pattern: Mapping[str, _Value], keys: Sequence[ModuleKey], budget: Budget
) -> dict[ModuleKey, _Value]:
    """Return each module's value in `pattern`, PEFT's `rank_pattern` or `alpha_pattern`: the first match wins.

    Modules without a match are left out. Raise BadTargetsError, which names `field`, if a key can't be used.
    """
    entries = list(pattern)
    patterns = [Pattern(rf"(.*\.)?({text})$", "match", text) for text in entries]
    rows = _find(field, patterns, [key.path for key in keys], budget)
    picked: dict[ModuleKey, _Value] = {}
    for entry, row in zip(entries, rows, strict=True):
        for key, found in zip(keys, row, strict=True):
            if found is not None:
                picked.setdefault(key, pattern[entry])
    return picked


def _targeted(targeting: Targeting, paths: Sequence[str], budget: Budget) -> set[str]:
    targets, layers = targeting.target_modules, frozenset(targeting.layers_to_transform or ())
    hit = _listed("target_modules", targets, paths, budget)
    if isinstance(targets, str) or not layers:
        return hit
    exact = hit & set(targets)  # layers_to_transform doesn't apply to these
    if exact and len(targets) >= _PEFT_REWRITES_FROM:
        message = (
            f"is ambiguous in PEFT with {_PEFT_REWRITES_FROM} target_modules or more, some of them whole paths"
        )
        raise BadTargetsError("layers_to_transform", message)
    layer_of = _layers(targeting.layers_pattern, paths, budget)
    return exact | {path for path in hit if layer_of.get(path) in layers}


def _listed(field: str, entries: str | tuple[str, ...], paths: Sequence[str], budget: Budget) -> set[str]:
    if isinstance(entries, str):
        (row,) = _find(field, [Pattern(entries, "fullmatch", entries)], paths, budget)
        return {path for path, found in zip(paths, row, strict=True) if found is not None}
    named = frozenset(entries)
    return {path for path in paths if not named.isdisjoint(_endings(path))}


def _endings(path: str) -> Iterator[str]:
    """Yield the path, and the rest of the path after each dot."""
    yield path
    while "." in path:
        _, _, path = path.partition(".")
        yield path


def _layers(layers_pattern: Sequence[str], paths: Sequence[str], budget: Budget) -> dict[str, int]:
    """Return the layer index in each path, as found by the first of `layers_pattern` that matches the path."""
    patterns = [Pattern(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", "match", text) for text in layers_pattern]
    if not patterns:
        patterns = [Pattern(r".*?\.[^.]*\.(?P<idx>\d+)\.", "match", "")]
    layer_of: dict[str, int] = {}
    for row in _find("layers_pattern", patterns, paths, budget):
        for path, found in zip(paths, row, strict=True):
            if found:
                layer_of.setdefault(path, int(found))
    return layer_of


def _find(field: str, patterns: Sequence[Pattern], paths: Sequence[str], budget: Budget) -> list[list[str | None]]:
    try:
        return find(patterns, paths, budget)
    except BadPatternError as error:
        raise BadTargetsError(field, f"{patterns[error.index].user_text[:100]!r}: {error}") from None

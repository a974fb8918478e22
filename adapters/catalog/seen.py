"""How what the tables know by keys looks to a project: its own names alone, others' with their project."""

import re
from dataclasses import replace

from adapters.catalog.versions import Adapter, Part, Version
from adapters.names import NAME
from adapters.viewpoint import Viewpoint

_OF_PARTS = re.compile(rf"(?:(?:{NAME.pattern}/)?{NAME.pattern}@[0-9]+: )+")
"""With what a warning begins that was kept with a part, or a part's part: see `Origin.of`."""


def seen(of: Viewpoint, version: Version) -> Version:
    """A version. Of another project's, how it was made stays there, unless all is seen."""
    name, parts = of.shown(version.name), tuple(part_seen(of, part) for part in version.parts)
    if of.sees_all or of.owns(version.name):
        is_same = name == version.name and parts == version.parts
        return version if is_same else replace(version, name=name, parts=parts)
    hidden = replace(version, parent=None, job_id=None, data_digest=None, config={}, key_id=None)
    warnings = dict.fromkeys(_without_parts(text) for text in version.warnings)
    return replace(hidden, name=name, parts=parts, warnings=tuple(warnings))


def part_seen(of: Viewpoint, part: Part) -> Part:
    """A part of a composition, or of an expression."""
    name = of.shown(part.name)
    return part if name == part.name else replace(part, name=name)


def adapter_seen(of: Viewpoint, adapter: Adapter) -> Adapter:
    """A name with its versions."""
    versions = tuple(seen(of, version) for version in adapter.versions)
    return replace(adapter, name=of.shown(adapter.name), versions=versions)


def _without_parts(warning: str) -> str:
    found = _OF_PARTS.match(warning)
    return warning if found is None else warning[found.end() :]

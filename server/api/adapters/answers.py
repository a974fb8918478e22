"""Adapters and versions as the API lists them, built by hand: a listing may have thousands."""

from collections.abc import Set

from adapters.catalog.catalog import Adapter, Version
from adapters.recorded import FILE_DIGEST

Document = dict[str, object]


def adapter_answer(adapter: Adapter, resident: Set[str]) -> Document:
    """One name. `resident` are the digests in the engine's memory. A composition's parts are its latest's."""
    latest = next(version for version in adapter.versions if version.version == adapter.latest)
    return {
        "name": adapter.name,
        "kind": adapter.kind,
        "latest": adapter.latest,
        "visibility": "public" if adapter.is_public else "private",
        "aliases": dict(adapter.aliases),
        **_parts(latest),
        "versions": [version_answer(version, resident) for version in adapter.versions],
        "resident": any(_is_resident(version, resident) for version in adapter.versions),
    }


def version_answer(version: Version, resident: Set[str]) -> Document:
    """One version. A composition has no alpha: its parts have theirs."""
    return {
        "name": version.name,
        "version": version.version,
        "kind": version.kind,
        "digest": version.digest,
        **_parts(version),
        "rank": version.rank,
        "alpha": None if version.parts else version.alpha,
        "target_modules": list(version.target_modules),
        "parameters": version.parameters,
        "bytes": version.bytes,
        "base_model": version.base_model,
        "base_digest": version.base_digest,
        "data_digest": version.data_digest,
        "config": {key: value for key, value in version.config.items() if key != FILE_DIGEST},
        "metrics": dict(version.metrics),
        "parent": version.parent,
        "job_id": version.job_id,
        "created_at": version.created_at.isoformat(),
        "resident": _is_resident(version, resident),
        "warnings": list(version.warnings),
    }


def _parts(version: Version) -> Document:
    if not version.parts:
        return {}
    keys = ("name", "version", "digest", "weight")
    return {"parts": [{key: getattr(part, key) for key in keys} for part in version.parts]}


def _is_resident(version: Version, resident: Set[str]) -> bool:
    """A composition is where all its parts are."""
    if version.parts:
        return all(part.digest in resident for part in version.parts)
    return version.digest in resident

"""A check for Schemathesis: a route answers a key only if the key has one of the scopes in the document.

Also, no run limits its own key or project: afterwards every answer would be a refusal.
`st run` loads this module (SCHEMATHESIS_HOOKS). The variable KEY_SCOPES has the scopes of the key that is sent.
"""

import os
from typing import Any

import schemathesis

_REFUSALS = {403, 404, 405, 429}
"""The statuses that a key without a route's scope may get: 404 and 405 if the path or the method is another's."""
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_jobs", "max_bytes", "max_versions", "max_job_seconds")


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: object) -> object:
    if not isinstance(body, dict):
        return body
    return body | {name: 1 << 40 for name in _LIMITS if isinstance(body.get(name), int) and body[name] > 0}


@schemathesis.check
def scopes_are_required(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: "schemathesis.Case[Any]"
) -> None:
    scopes = set(os.environ["KEY_SCOPES"].split(","))
    security = case.operation.definition.raw.get("security")
    if security is None or case.method.upper() != case.operation.method.upper():
        return
    needed = [set(roles) for requirement in security for roles in requirement.values()]
    if "admin" in scopes or any(not roles or roles & scopes for roles in needed):
        assert "lacks the scope" not in response.text, f"the key has the scope: {response.text}"
    else:
        assert response.status_code in _REFUSALS, f"the key lacks the scope, and got {response.status_code}"

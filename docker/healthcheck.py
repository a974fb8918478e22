"""Exit 0 while the server in this container is ready. The standard library alone, so that it starts at once."""

import os
import sys
from http.client import HTTPConnection, HTTPException


def main() -> int:
    """The exit status; why it isn't 0 goes to standard error."""
    connection = HTTPConnection("127.0.0.1", int(os.environ.get("SMOLORA_PORT") or 8000), timeout=4)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        body = answer.read(1000).decode(errors="replace")
    except (OSError, HTTPException) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        connection.close()
    if answer.status != 200:
        sys.stderr.write(f"{answer.status} {body}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

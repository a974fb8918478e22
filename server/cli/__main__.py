"""`python -m server.cli` is `smolora`."""

from server.cli.main import main

main()

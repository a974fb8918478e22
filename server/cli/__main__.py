"""Run the `smolora` script as `python -m server.cli`."""

from server.cli.main import main

main()

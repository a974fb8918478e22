"""The smolora server: model, engine, HTTP API and command line."""

__version__ = "0.1.0"

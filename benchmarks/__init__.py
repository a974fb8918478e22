"""Benchmarks of serving and training against the tools that users would otherwise pick. Not part of the installed
package.

Each command measures one thing: serve, train, science, decisions, train_and_serve and others. `peers` installs
the peers; `report` writes docs/benchmarks.md from the results.
"""

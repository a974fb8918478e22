"""What a setting may be, in the place of what pydantic says of one that isn't: a pattern, say."""

from pydantic_core import ErrorDetails

_KINDS = {
    "bool_parsing": "must be 1 or 0",
    "byte_size": "must be a number of bytes, such as 2GiB",
    "byte_size_unit": "must be a number of bytes, such as 2GiB",
    "float_parsing": "must be a number",
    "int_parsing": "must be a whole number",
}
_SHAPES = {
    "device": "must be auto, cpu, cuda or cuda:N",
    "public_url": "must be like https://lora.example.org/lora, with no / at its end",
    "root_path": "must be like /smolora, with a / before it and none at its end",
}
"""Of what has a pattern."""


def in_words(fault: ErrorDetails) -> str:
    """For a person, in less than a line."""
    if fault["type"] == "int_parsing" and str(fault["input"]).startswith("tcp://"):
        return "is a service's address, by Kubernetes: set enableServiceLinks: false for the pod, or the port here"
    if fault["type"] == "string_pattern_mismatch":
        return _SHAPES.get(str(fault["loc"][0]), fault["msg"])
    return _KINDS.get(fault["type"], fault["msg"])

"""Report of larger bases: a Markdown table for each."""

from dataclasses import dataclass, field

from benchmarks.command import QUICK, Made
from benchmarks.serving import report as serving
from benchmarks.serving.results import Results as Serving
from benchmarks.tables import gigabytes, rounds


@dataclass
class Results:
    """Results by size. Each size may be from another run."""

    sizes: dict[str, Serving] = field(default_factory=dict)  # by the name of the shape

    @property
    def made(self) -> Made:
        """How the results were produced: by a quick run, if any of them was."""
        runs = [size.made for size in self.sizes.values()]
        return next((made for made in runs if made.quick), runs[0])


def markdown(results: Results) -> str:
    """Describe what was run, and list the speeds and the memory of each size."""
    (first, *_) = results.sizes.values()
    settings = first.settings
    work = (
        "SmolLM2's larger sizes with random weights, in Q4_1 and Q8_0 as in the embedded base; llama.cpp has them "
        f"in 16 bits, and quantized; prompts of {settings.prompt_tokens} tokens, {settings.max_tokens} new ones, "
        f"otherwise as above; {rounds(settings.rounds)}, all systems in turn"
    )
    parts = [f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    for name, found in results.sizes.items():
        memory = ", ".join(f"{system} {gigabytes(peak)}" for system, peak in found.peak_rss.items() if peak)
        parts += [
            f"### {name}",
            f"`{found.made.program}`, {found.made.day}. {found.machine.hardware}.",
            "Output tokens per second:",
            serving.speed_table(found),
            f"Peak RSS: {memory}. A step reads {gigabytes(found.settings.weight_bytes)}.",
        ]
    return "\n\n".join(parts) + "\n"

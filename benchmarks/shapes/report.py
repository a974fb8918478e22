"""Results of larger bases for people: a table of each in Markdown."""

from dataclasses import dataclass, field

from benchmarks.command import QUICK, Made
from benchmarks.measure import median_ratio
from benchmarks.serving import report as serving
from benchmarks.serving.results import Results as Serving
from benchmarks.serving.systems.systems import BASE
from benchmarks.tables import gigabytes, rounds, spread, table


@dataclass
class Results:
    """Each size may be of another run."""

    sizes: dict[str, Serving] = field(default_factory=dict)  # by the shape's name

    @property
    def made(self) -> Made:
        """Of a quick run, if one of the sizes is."""
        runs = [size.made for size in self.sizes.values()]
        return next((made for made in runs if made.quick), runs[0])


def markdown(results: Results) -> str:
    """What was run, and for each size its speeds, its ratios and its memory."""
    (first, *_) = results.sizes.values()
    settings = first.settings
    work = (
        "SmolLM2's larger sizes with random weights in Q4_1 and Q8_0 as the embedded base has them; llama.cpp has "
        f"the same weights in 16 bits, and quantized anew; prompts of {settings.prompt_tokens} tokens, "
        f"{settings.max_tokens} new tokens, otherwise as above; {rounds(settings.rounds)}, all systems in turn"
    )
    parts = [f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    for name, found in results.sizes.items():
        memory = ", ".join(f"{system} {gigabytes(peak)}" for system, peak in found.peak_rss.items() if peak)
        parts += [
            f"### {name}",
            f"`{found.made.command}`, {found.made.day}. {found.machine}.",
            "Output tokens per second, all streams together:",
            serving.speed_table(found),
            "Ratios of the rounds:",
            ratio_table(found),
            f"A step reads {gigabytes(found.settings.weight_bytes)} of weights. Peak RSS: {memory}.",
        ]
    return "\n\n".join(parts) + "\n"


def ratio_table(found: Serving) -> str:
    """Ours to own base and to each peer."""
    peers = [facts.name for facts in found.systems[1:]]
    cells = []
    for row in found.rows:
        base = found.row(row.load.streams, BASE)
        of_base = None if base is None or base is row else median_ratio(row.speed(), base.speed())
        against = [spread(median_ratio(row.speed(), row.speed(peer)), "×") for peer in peers]
        cells.append([row.load.title, spread(of_base, ""), *against])
    return table(("load", "of own base", *peers), cells)

"""Writes the model card of a run: Markdown in the format of Hugging Face, from the run's own files.

python -m genai_jax.model_card --workdir=D [--output=FILE] [--scores=scores.json]

What only people can know, such as the intended use, is left to fill in. --scores takes what
`python -m genai_jax.evaluate --workdir=D > scores.json` printed. In Python,
`genai_jax.model_card(workdir, ...)` writes the same card.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from genai_jax.callable_commands import callable_as, request_of
from genai_jax.command import run
from genai_jax.config import ConfigError, asks_for_help, field, help_text, parse, refuse_set
from genai_jax.files import read_object, write_text, writing_to
from genai_jax.scaling.footprint import (
    INTENSITY,
    OVERHEAD,
    Footprint,
    by_factors,
    measured,
    watts_of,
)

if TYPE_CHECKING:
    from genai_jax.scaling.run_facts import RunFacts

DEFAULT = "README.md"  # what the Hugging Face Hub shows of a repository


@dataclasses.dataclass(frozen=True)
class CardRequest:
    workdir: str = field("", "Folder of the run.", path=True)
    output: str = field("", f"File to write; WORKDIR/{DEFAULT} if unset.", path=True)
    name: str = field("", "Name of the model; that of the workdir if unset.")
    license: str = field("", "License of the model, such as apache-2.0; left to fill in if unset.")
    scores: str = field(
        "", "JSON file with what the evaluate command printed; if unset, the card has the held-out "
        "metrics of the training.", path=True,
    )  # fmt: skip
    emissions: str = field(
        "", "The emissions.csv of codecarbon that measured the training; if unset, energy and "
        "emissions are estimated from the device hours.", path=True,
    )  # fmt: skip
    device_watts: float | None = field(
        None, "Power of one device in watts; of known accelerators if unset.", minimum=0
    )
    overhead: float | None = field(
        None, "Energy of the data center per energy of its devices (PUE); 1.57 if unset.", minimum=1
    )
    carbon_intensity: float | None = field(
        None, "Carbon intensity of the electricity in g CO2e per kWh; 475 if unset.", minimum=0
    )


def model_card(workdir: str | os.PathLike, **flags: Any) -> pathlib.Path:
    """Writes the model card of a run and returns its file.

    Args:
      workdir: folder of the run.
      **flags: those of the command: `output`, `license`, `scores`, `emissions`, ...

    Raises:
      ConfigError: see `write_card`; or flags that the command does not have.
    """
    return write_card(request_of(CardRequest, {"workdir": workdir, **flags}))


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": CardRequest}))
        return 0
    path = write_card(parse(argv, {"run": CardRequest})[0].run)
    print(f"model card: {path}")
    return 0


def write_card(request: CardRequest) -> pathlib.Path:
    """Writes the card of a run.

    Returns:
      Its file.

    Raises:
      ConfigError: no run, flags that exclude each other, a file that cannot be read or written, or
        a card that is there already, in which something may have been filled in.
    """
    if not request.workdir:
        raise ConfigError("--workdir is not set; name the folder of a run")
    if request.emissions:
        factors = ("device_watts", "overhead", "carbon_intensity")
        refuse_set("run", request, factors, "has no effect with --emissions, which was measured")
    path = pathlib.Path(request.output or pathlib.Path(request.workdir) / DEFAULT)
    if path.is_dir():
        raise ConfigError(f"--output={request.output} is a folder; name a file for the card")
    if path.exists():
        raise ConfigError(
            f"{path} is there already, and may have been edited; name another file with --output"
        )
    # jax, which --help and flag errors do without
    from genai_jax.scaling.model_card import card_text
    from genai_jax.scaling.run_facts import read_facts

    facts = read_facts(request.workdir)
    scores = read_object(request.scores, f"--scores={request.scores}") if request.scores else None
    name = request.name or pathlib.Path(request.workdir).absolute().name
    text = card_text(facts, name, request.license, scores, _footprint(request, facts))
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path


def _footprint(request: CardRequest, facts: "RunFacts") -> Footprint | None:
    if request.emissions:
        return measured(request.emissions)
    power = watts_of(facts.get("device_kind", str) or "")
    if request.device_watts is not None:
        power = request.device_watts, "--device_watts"
    if power is None or facts.device_hours is None:
        return None
    overhead = OVERHEAD if request.overhead is None else request.overhead
    intensity = INTENSITY if request.carbon_intensity is None else request.carbon_intensity
    return by_factors(facts.device_hours, *power, overhead, intensity)


callable_as(model_card)

if __name__ == "__main__":
    run(main)

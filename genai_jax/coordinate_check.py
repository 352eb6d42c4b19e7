"""Measures how far activations move in the first training steps, at several model widths.

python -m genai_jax.coordinate_check --flagfile=F --output=DIR [--widths=64,128,256,512]

The coordinate check of Yang et al. 2022 ("Tensor Programs V", appendix D.1), for both
parametrizations. Where every activation changes by the same amount at all widths, a learning rate
means the same at all of them; in the standard parametrization the changes grow with the width.

The models keep the proportions of the run: wider models get more heads, or wider ones if
--transformer.base_head_dim is set. The learning rate stays at its peak from the first step on. The
logits are the last to behave this way: a random head passes on only about 1 / sqrt(width) of a
change in the layers below it, and training has to outgrow that.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError, asks_for_help, field, flag_names, help_text, parse
from genai_jax.files import writing_to


@dataclasses.dataclass(frozen=True)
class CoordinateRequest:
    output: str = field("", "Folder for the plot and the tables.", path=True)
    widths: str = field("64,128,256,512", "Model widths (embed_dim), comma-separated.")
    steps: int = field(5, "Number of training steps.", minimum=1)
    seeds: int = field(1, "Number of seeds to average the changes over.", minimum=1)


def main(argv: Sequence[str]) -> int:
    if asks_for_help(argv):
        print(help_text(__doc__, {"run": CoordinateRequest}))
        print("\nand every flag of the train command")
        return 0
    # Matplotlib, which --help does without.
    from genai_jax.scaling.coordinate_check import check, slopes, write

    names = flag_names({"run": CoordinateRequest})
    own = [a for a in argv if a.lstrip("-").split("=")[0] in names]
    request = parse(own, {"run": CoordinateRequest})[0].run
    if not request.output:
        raise ConfigError("--output is not set: name a folder for the plot and the tables")
    config = parse_run([a for a in argv if a not in own])
    changes = check(config, _widths(request.widths), request.steps, make_task, request.seeds)
    with writing_to(f"--output={request.output}"):
        write(changes, pathlib.Path(request.output))
    for (parametrization, activation), slope in slopes(changes).items():
        print(f"{parametrization:15} {activation:35} width^{slope:+.2f}")
    return 0


def _widths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--widths={text} is not a list of widths such as 64,128,256")
    widths = sorted({int(part) for part in parts})
    if len(widths) < 2:
        raise ConfigError(f"--widths={text}: a slope needs at least two widths")
    return widths


if __name__ == "__main__":
    run(main)

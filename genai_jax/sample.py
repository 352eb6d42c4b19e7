"""Draws from a run: python -m genai_jax.sample --workdir=D [--prompt=TEXT --num_samples=N ...]"""

import dataclasses
import pathlib
from collections.abc import Sequence

from genai_jax.command import run
from genai_jax.components import parse_run_of, read_config
from genai_jax.config import ConfigError, field, help_text
from genai_jax.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    workdir: str = field("", "folder of the run")
    checkpoint_step: int | None = field(None, "step to draw from; the newest if unset", minimum=0)
    ema: str | None = field(None, "average to draw from, named by its decay; none if unset")
    seed: int = field(0, "of the draws", minimum=0)
    num_samples: int = field(1, "draws, for each prompt", minimum=1)
    output: str = field("", "file to write instead of stdout")
    prompt: str = field("", "text to continue")
    prompt_file: str = field("", "file with a prompt on every line")
    max_tokens: int = field(256, "tokens drawn at most, for each sample", minimum=1)
    temperature: float = field(1.0, "divides the logits; 0 takes the likeliest token", minimum=0)
    top_k: int = field(0, "draw among the k likeliest tokens; 0: all", minimum=0)
    top_p: float = field(1.0, "draw among the likeliest whose mass reaches p", minimum=0, maximum=1)
    stop: str = field("", "text that ends a sample, itself left out")

    def prompts(self) -> list[str]:
        """The prompts, at least one, perhaps empty."""
        if not self.prompt_file:
            return [self.prompt]
        try:
            lines = pathlib.Path(self.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read --prompt_file={self.prompt_file}: {error}") from None
        if not lines:
            raise ConfigError(f"--prompt_file={self.prompt_file} is empty")
        return lines


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(help_text(__doc__, {"run": SampleConfig}))
        return 0
    request = parse_run_of(argv, SampleConfig)
    config = read_config(request.workdir)
    from genai_jax.training.restore import restore_model
    from genai_jax.training.sharding import mesh_context

    task = TASKS[config.run.task](config)
    model = restore_model(task, config, step=request.checkpoint_step, ema=request.ema)
    with mesh_context(model.mesh):
        texts = task.sample(model.params, model.mutables, request)
    if len(texts) > 1:
        texts = [f"--- sample {i + 1} of {len(texts)}\n{text}" for i, text in enumerate(texts)]
    if request.output:
        pathlib.Path(request.output).write_text("\n".join(texts) + "\n", encoding="utf-8")
    else:
        print("\n".join(texts))
    return 0


if __name__ == "__main__":
    run(main)

"""Real runs, in this process."""

import json
import pathlib

from genai_jax import train


def run_to(workdir, steps: int, *flags: str) -> list[dict]:
    """Trains in `workdir` to a step; returns what training logged at each."""
    common = (f"--workdir={workdir}", "--train.progress=false", "--train.log_every=1")
    assert train.main([*common, *flags, f"--train.steps={steps}"]) == 0
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k.startswith(("step", "train/"))} for row in rows]

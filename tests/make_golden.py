"""Writes tests/golden/ anew: python -m tests.make_golden. Read the diff before committing it."""

import json

from tests.golden_values import GOLDEN, PLACED, STEP_FLAGS, flagfiles, one_step, placed, resolved


def main():
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.flags"):
        old.unlink()
    for name, path in flagfiles().items():
        (GOLDEN / name).write_text(resolved(path))
    for name in PLACED:
        (GOLDEN / f"{name}.shardings").write_text(placed(name))
    numbers = {name: one_step(flags) for name, flags in STEP_FLAGS.items()}
    (GOLDEN / "one_step.json").write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()

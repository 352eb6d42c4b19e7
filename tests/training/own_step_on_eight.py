"""Prints what the step of tests/training/test_own_step.py gives on eight devices, as JSON."""

import json

import numpy as np

from tests.training.test_own_step import RULES, with_ours

state, metrics = with_ours(3, rules=RULES, mesh={"fsdp": 4})
kernel = state.params["layer"]["kernel"]
moment = state.opt_state["own"][0].mu["layer"]["kernel"]
print(
    json.dumps(
        {
            "losses": [m["loss"] for m in metrics],
            "kernel": np.asarray(kernel).tolist(),
            "partition": [*kernel.sharding.spec],
            "moment": [*moment.sharding.spec],
        }
    )
)

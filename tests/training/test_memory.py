"""Sizes that no memory holds are refused before anything is allocated, or compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genai_jax import train
from genai_jax.config import ConfigError
from genai_jax.training.memory import check_fits
from tests.commands import TINY

HUGE = 2**31 - 2


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("data.batch_size", r"the batch of this run needs 1,280\.0 GiB on each device, which has"),
        ("data.sequence_length", r"the batch of this run needs 320\.0 GiB"),
        ("transformer.num_layers", r"the state \(parameters, optimizer, averages\) of this run"),
        ("transformer.mlp_dim", r"the state .* needs 2,304\.0 GiB"),
        ("language_model.vocab_size", r"the state .* needs 768\.0 GiB"),
        ("moe.num_experts", "the state .* GiB"),
        ("population.size", r"in the range \[1, 65536\]"),
        ("train.accumulate", f"not divisible by 1 .* {HUGE} part"),
        ("transformer.window", r"in the range \[0, 1073741824\]"),
        ("eval.batches", None),
    ],
)
def test_a_size_that_no_memory_holds_says_what_it_would_need(flag, said, tmp_path):
    flags = (*TINY, f"--workdir={tmp_path}")
    if said:
        with pytest.raises(ConfigError, match=said):
            train.main([*flags, f"--{flag}={HUGE}"])
    with pytest.raises(
        ConfigError, match=rf"--{flag}={2 * HUGE}: .* is not an integer in the range"
    ):
        train.main([*flags, f"--{flag}={2 * HUGE}"])


def test_the_bytes_of_a_device_are_those_of_its_part():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    shape = lambda rows, dtype: jax.ShapeDtypeStruct((rows, 2**20), dtype, sharding=sharding)
    check_fits("batch", {"a": shape(4, jnp.uint8)})
    with pytest.raises(ConfigError, match=r"the batch of this run needs 2,048\.0 GiB on each"):
        check_fits("batch", [shape(2**20, jnp.bfloat16)])

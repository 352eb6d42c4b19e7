"""Sizes that no memory holds are refused before anything is allocated, or compiled."""

import jax
import jax.numpy as jnp
import pytest

from genai_jax import train
from genai_jax.config import ConfigError
from genai_jax.tasks.protocol import ArraySpec
from genai_jax.training.memory import check_batch_fits
from genai_jax.training.sharding import MeshConfig, make_mesh
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
        ("population.size", "is not a whole number from 1 to 65536"),
        ("train.accumulate", f"not divisible by 1 .* {HUGE} part"),
        ("transformer.window", "is not a whole number from 0 to 1073741824"),
        ("eval.batches", None),
    ],
)
def test_a_size_that_no_memory_holds_says_what_it_would_need(flag, said, tmp_path):
    flags = (*TINY, f"--workdir={tmp_path}")
    if said:
        with pytest.raises(ConfigError, match=said):
            train.main([*flags, f"--{flag}={HUGE}"])
    with pytest.raises(ConfigError, match=f"--{flag}={2 * HUGE}: .* is not a whole number from"):
        train.main([*flags, f"--{flag}={2 * HUGE}"])


def test_the_bytes_of_a_device_are_those_of_its_part():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    spec = lambda rows, dtype: {"a": ArraySpec((rows, 2**20), dtype, ("batch", None))}
    check_batch_fits(spec(4, jnp.uint8), mesh)
    with pytest.raises(ConfigError, match=r"the batch of this run needs 2,048\.0 GiB on each"):
        check_batch_fits(spec(2**20, jnp.bfloat16), mesh)

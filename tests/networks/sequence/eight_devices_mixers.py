"""One network of all mixers on 1 and on 8 simulated devices; prints the differences as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

sys.path.insert(0, ".")

from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers import MIXERS
from genai_jax.networks.sequence.transformer import Transformer, partition_rules
from genai_jax.training.sharding import MeshConfig, make_mesh, mesh_context, parameter_specs

OTHERS = {f"dilated{2**i}" for i in range(10) if i != 2}  # one dilation for all
NAMES = [name for name in MIXERS if name not in OTHERS]
CONFIG = TransformerConfig(
    num_layers=len(NAMES), embed_dim=16, num_heads=4, mlp_dim=0, pattern=",".join(NAMES),
    state_dim=4, dilation=2, block_size=4, window=5, sinks=2,
)  # fmt: skip
VOCABULARY = 12
TOKENS = jax.random.randint(jax.random.key(0), (8, 12), 0, VOCABULARY)
IDS = jnp.array([[1] * 5 + [2] * 7] * 8)
POSITIONS = jnp.array([[*range(5), *range(7)]] * 8)


def loss_and_gradient(params, devices, mesh_config: MeshConfig):
    mesh = make_mesh(mesh_config, devices)
    model = Transformer(CONFIG, VOCABULARY)

    def loss(params):
        hidden, _ = model.apply({"params": params}, TOKENS, POSITIONS, IDS)
        return jnp.mean(jnp.square(hidden))

    specs = parameter_specs(params, partition_rules(CONFIG), mesh)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    with mesh_context(mesh):
        placed = jax.tree.map(place, params, specs)
        result = jax.jit(jax.value_and_grad(loss))(placed)
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
    return jax.device_get(result), split


def main():
    assert jax.device_count() == 8, jax.devices()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Transformer(CONFIG, VOCABULARY).init, jax.random.key(1), TOKENS)
    random = lambda x: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype)
    params = jax.tree.map(random, shapes["params"])
    (loss, one), _ = loss_and_gradient(params, jax.devices()[:1], MeshConfig())
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    (other, eight), split = loss_and_gradient(params, jax.devices(), mesh)
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(a).max()), one, eight)
    worst = max(jax.tree.leaves(gaps))
    print(json.dumps({"loss": abs(float(loss - other)), "gradient": worst, "sharded": split}))


if __name__ == "__main__":
    main()

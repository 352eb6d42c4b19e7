"""One layer of every mixer on 1 and on 8 simulated devices; prints the differences as JSON."""

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
OPTIONS = dict(state_dim=4, dilation=2, block_size=4, window=5, sinks=2)
VOCABULARY = 12
TOKENS = jax.random.randint(jax.random.key(0), (8, 12), 0, VOCABULARY)
IDS = jnp.array([[1] * 5 + [2] * 7] * 8)
POSITIONS = jnp.array([[*range(5), *range(7)]] * 8)


def network(name: str) -> Transformer:
    own = {k: v for k, v in OPTIONS.items() if k in MIXERS[name].options}
    shape = dict(num_layers=1, embed_dim=16, num_heads=4, mlp_dim=0, pattern=name)
    return Transformer(TransformerConfig(**shape, **own), VOCABULARY)


NETWORKS = {name: network(name) for name in MIXERS if name not in OTHERS}


def hidden_and_gradients(params: dict, devices: list, mesh_config: MeshConfig):
    """Of all networks, in one program; and the number of parameters that are split."""
    mesh = make_mesh(mesh_config, devices)

    def loss(params):
        hidden = {
            name: model.apply({"params": params[name]}, TOKENS, POSITIONS, IDS)[0]
            for name, model in NETWORKS.items()
        }
        return sum(jnp.mean(jnp.square(h)) for h in hidden.values()), hidden

    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    specs = {
        name: parameter_specs(params[name], partition_rules(model.config), mesh)
        for name, model in NETWORKS.items()
    }
    with mesh_context(mesh):
        placed = jax.tree.map(place, params, specs)
        gradients, hidden = jax.jit(jax.grad(loss, has_aux=True))(placed)
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
    return jax.device_get((hidden, gradients)), split


def main():
    assert jax.device_count() == 8, jax.devices()
    rng = np.random.default_rng(0)
    random = lambda x: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype)
    params = {
        name: jax.tree.map(random, jax.eval_shape(model.init, jax.random.key(1), TOKENS)["params"])
        for name, model in NETWORKS.items()
    }
    one, _ = hidden_and_gradients(params, jax.devices()[:1], MeshConfig())
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    eight, split = hidden_and_gradients(params, jax.devices(), mesh)
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(a).max()), one, eight)
    hidden, gradients = gaps
    gradients = {name: float(np.max(jax.tree.leaves(of))) for name, of in gradients.items()}
    print(json.dumps({"hidden": hidden, "gradients": gradients, "sharded": split}))


if __name__ == "__main__":
    main()

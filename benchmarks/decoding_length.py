"""Time and memory of decoding, by the number of tokens before: recurrent mixers beside attention.

    python -m benchmarks.decoding_length

Decodes 64 tokens of each of 8 rows after 256 tokens and after 8,192, with a state that has room for
just these. The rounds alternate between the two; times are medians, the ratio is that of a round.
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.transformer import Transformer, empty_state

BATCH, TOKENS, VOCABULARY = 8, 64, 256
SHORT, LONG = 256, 8192
MIXERS = ("attention", "latent_attention", "mamba", "mamba2", "gated_delta_rule", "rg_lru", "lstm")


def decoder(mixer: str, before: int):
    """A compiled function that decodes, its arguments, and the bytes of the state."""
    mlp_dim = 0 if mixer.startswith("mamba") else None
    config = TransformerConfig(
        num_layers=4, embed_dim=128, num_heads=2, pattern=mixer, mlp_dim=mlp_dim
    )
    model = Transformer(config, VOCABULARY)
    first = jnp.zeros((BATCH, 1), jnp.int32)
    params = jax.jit(lambda key: model.init(key, first, method="init_all"))(jax.random.key(0))
    state = empty_state(config, BATCH, before + TOKENS, jnp.float32)

    def step(carry, position):
        tokens, state = carry
        positions = jnp.full((BATCH, 1), position)
        hidden, state = model.apply(params, tokens, positions, state=state)
        logits = model.apply(params, hidden, method="logits")
        return (jnp.argmax(logits, -1).astype(jnp.int32), state), None

    def decode(tokens, state):
        positions = before + jnp.arange(TOKENS)
        return jax.lax.scan(step, (tokens, state), positions)[0][0]

    size = sum(a.nbytes for a in jax.tree.leaves(state))
    return jax.jit(decode), (first, state), size


def seconds(function, arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def measure(mixer: str, rounds: int) -> dict:
    short, long = decoder(mixer, SHORT), decoder(mixer, LONG)
    for function, arguments, _ in (short, long):
        seconds(function, arguments)  # compiles
    pairs = [(seconds(*short[:2]), seconds(*long[:2])) for _ in range(rounds)]
    per_token = lambda i: 1e3 * statistics.median(pair[i] for pair in pairs) / TOKENS
    return {
        f"milliseconds_after_{SHORT}": round(per_token(0), 3),
        f"milliseconds_after_{LONG}": round(per_token(1), 3),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        f"state_kib_per_row_{SHORT}": round(short[2] / BATCH / 1024, 1),
        f"state_kib_per_row_{LONG}": round(long[2] / BATCH / 1024, 1),
    }


def main(names: tuple[str, ...] = MIXERS, rounds: int = 9) -> dict:
    return {name: measure(name, rounds) for name in names} | {"versions": {"jax": jax.__version__}}


if __name__ == "__main__":
    print(json.dumps(main(tuple(sys.argv[1:]) or MIXERS), indent=2))

"""Generative models in pure JAX: one sharded training step for every family.

Each module of this package with a `main` is a command: `python -m genai_jax.train --help`. What a
family consists of is in `genai_jax.tasks.protocol`; README.md has everything else.
"""

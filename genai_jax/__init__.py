"""Generative models in pure JAX: one sharded training step for every family."""

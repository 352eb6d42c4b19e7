"""Recurrences as pure functions: token by token, and the same in parallel or in chunks.

All compute in float32. Arrays are [batch, length, ...]; a state is arrays [batch, ...]. Padding
leaves a state as it is, and a document begins with an empty state: see `boundaries`.
"""

"""Mixture of experts: a router chooses, for each token, the few of many MLPs that compute it.

With a capacity, an expert takes so many tokens of a group and the others pass by (Lepikhin et al.
2020, GShard; Fedus et al. 2022, Switch). Without one every choice is computed, by a matmul whose
rows are sorted by expert (Gale et al. 2022, MegaBlocks). Either way rows are moved by index, forth
and back by gathers alone, and never by one-hot arrays [tokens, experts, capacity].

On a mesh every device keeps the experts of its part of the `experts` axis; rows go there and come
back by an all-to-all. What goes where is written down with `jax.shard_map`, so that the kernels of
the grouped matmul run inside it.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from genai_jax.config import field
from genai_jax.networks.layers.dense import GATED, Mlp, activate
from genai_jax.networks.parallel.axes import axis_size, free_axes, split_over, whole_axes
from kernels_pallas import grouped_matmul

SCORES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The experts of every block, their router and the weights of its losses."""

    num_experts: int = field(0, "experts that replace the MLP of a block; 0: none do", minimum=0)
    experts_per_token: int = field(2, "experts that compute a token", minimum=1)
    expert_dim: int | None = field(
        None, "hidden width of an expert; that of the dense MLP if unset", minimum=1
    )
    shared_experts: int = field(0, "experts that compute every token as well", minimum=0)
    score: str = field("softmax", "score of an expert, of the router's logits", choices=SCORES)
    renormalize: bool = field(True, "the weights of a token's experts sum to 1")
    capacity_factor: float = field(
        0.0, "tokens an expert takes, relative to an even share; 0: all (dropless)", minimum=0
    )
    group_size: int | None = field(
        None, "consecutive tokens that share the capacity; a row if unset", minimum=1
    )
    exchange_factor: float = field(
        0.0, "dropless: tokens a device takes from another, relative to an even share; 0: all",
        minimum=0,
    )  # fmt: skip
    load_balance: float = field(0.01, "weight of the load-balance loss", minimum=0)
    router_z_loss: float = field(0.001, "weight of the router's squared log-normalizer", minimum=0)

    def __post_init__(self):
        if not self.num_experts:
            for f in dataclasses.fields(self):
                if getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"--moe.{f.name}={getattr(self, f.name)} needs experts: set "
                        "--moe.num_experts"
                    )
        elif self.experts_per_token > self.num_experts:
            raise ValueError(
                f"--moe.experts_per_token={self.experts_per_token} is more than "
                f"--moe.num_experts={self.num_experts}"
            )
        elif self.experts_per_token == 1 < self.num_experts and self.renormalize:
            raise ValueError(
                "--moe.experts_per_token=1 makes every renormalized weight 1, which teaches the "
                "router nothing: set --moe.renormalize=false"
            )
        if self.capacity_factor and self.exchange_factor:
            raise ValueError(
                f"--moe.exchange_factor={self.exchange_factor} is for dropless routing, without "
                f"--moe.capacity_factor={self.capacity_factor}"
            )


# Parameter path -> logical axes.
PARTITION_RULES = (
    (r"mlp/router/kernel", ("layers", "embed", None)),
    (r"mlp/experts/(up|gate)", ("layers", "experts", "embed", "mlp")),
    (r"mlp/experts/down", ("layers", "experts", "mlp", "embed")),
)


class RouterSums(NamedTuple):
    """What a router did, summed over the tokens that are not padding; float32.

    Sums, so that those of parts of a batch add up to those of the batch.
    """

    load: jax.Array  # [experts] tokens that chose an expert, dropped or not
    probability: jax.Array  # [experts] scores, those of a token summing to 1
    squared_z: jax.Array  # [] squared log-sum-exp of the logits
    entropy: jax.Array  # [] of the probabilities, nats
    computed: jax.Array  # [] choices that an expert computed
    tokens: jax.Array  # []


class MixtureOfExperts(nn.Module):
    """A router, its experts, and perhaps one MLP that computes every token.

    Where the collection "router" is mutable, what the router did is written there: `RouterSums`.
    The shared experts are one MLP of their joined width (Dai et al. 2024, DeepSeekMoE).

    Attributes:
      config: as flags say; of at least one expert.
      hidden_dim: of an expert whose width the config leaves open.
      out_scale: variance of the kernels `down`, times fan-in.
      width_growth: divides the router's logits, and multiplies the variance of its kernel.
    """

    config: MoeConfig
    hidden_dim: int
    activation: str = "swiglu"
    out_scale: float = 1.0
    width_growth: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, real: jax.Array | None = None, dropless: bool = False
    ) -> jax.Array:
        """[batch, length, embed] -> the same.

        Args:
          x: tokens.
          real: [batch, length] bool, False for padding: no expert takes it, nothing counts it.
          dropless: whether the capacity is ignored, as it is where a token must not depend on the
            tokens beside it.
        """
        c = self.config
        hidden_dim = c.expert_dim or self.hidden_dim
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        logits = Router(c.num_experts, self.width_growth, name="router")(x)
        routes = route(logits, real, c)
        if dropless or self.is_initializing():
            c = dataclasses.replace(c, capacity_factor=0.0, exchange_factor=0.0)
        experts = Experts(
            c, hidden_dim, self.activation, self.out_scale, self.dtype, name="experts"
        )
        out, computed = experts(x.astype(self.dtype), routes.choice, routes.weight)
        if self.is_mutable_collection("router"):
            sums = router_sums(logits, routes, real, computed)
            self.sow("router", "sums", sums, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        if c.shared_experts:
            shared = Mlp(
                c.shared_experts * hidden_dim, self.activation, False, self.out_scale, self.dtype,
                name="shared",
            )  # fmt: skip
            out = out + shared(x)
        return out


class Router(nn.Module):
    """A linear map to one logit an expert, in float32; width_growth as of `MixtureOfExperts`."""

    num_experts: int
    width_growth: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(self.width_growth, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.num_experts), jnp.float32)
        # "high" keeps 16 bits of the kernel on TPU, where the default keeps 8 and "highest" costs
        # as much as a twentieth of the experts; x has 8 where it comes in bfloat16.
        logits = jnp.matmul(x.astype(jnp.float32), kernel, precision="high")
        return logits if self.width_growth == 1 else logits / self.width_growth


class Routes(NamedTuple):
    """Which experts a token goes to, the best first, and what their outputs weigh."""

    choice: jax.Array  # [batch, length, experts_per_token] int32; num_experts for padding
    weight: jax.Array  # [batch, length, experts_per_token] float32
    probability: jax.Array  # [batch, length, num_experts] float32: scores that sum to 1


def route(logits: jax.Array, real: jax.Array, config: MoeConfig) -> Routes:
    """The highest scores of each token, logits [batch, length, num_experts]."""
    if config.score == "softmax":
        probability = score = jax.nn.softmax(logits)
    else:
        score = jax.nn.sigmoid(logits)
        probability = score / jnp.sum(score, -1, keepdims=True)
    choice = _best(jax.lax.stop_gradient(score), config.experts_per_token)
    # Not the values of top_k, whose gradient is a scatter.
    weight = jnp.sum(jnp.where(_one_hot(choice, config.num_experts), score[..., None, :], 0), -1)
    if config.renormalize:
        weight = weight / jnp.maximum(jnp.sum(weight, -1, keepdims=True), 1e-20)
    choice = jnp.where(real[..., None], choice, config.num_experts)
    return Routes(choice.astype(jnp.int32), weight, probability)


def _best(score, count: int):
    """The numbers of the `count` highest of [batch, length, experts], the best first."""
    top = lambda score: jax.lax.top_k(score, count)[1]
    if _on_one_device():
        return top(score)
    # Left to itself the compiler gathers the scores of all tokens on every device.
    tokens = _token_spec(score.shape)
    return jax.shard_map(
        top, in_specs=tokens, out_specs=tokens, axis_names=free_axes(), check_vma=False
    )(score)


def _one_hot(choice, num_experts: int):
    """[..., experts] bool; the compiler fuses it into the sum that it is for."""
    return choice[..., None] == jnp.arange(num_experts)


def router_sums(logits, routes: Routes, real, computed) -> RouterSums:
    """`RouterSums` of logits [batch, length, experts]; computed [batch, length, choices] bool."""
    counted = real.astype(jnp.float32)
    p = routes.probability
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20)), -1)
    load = jnp.sum(_one_hot(routes.choice, logits.shape[-1]), (0, 1, 2), dtype=jnp.float32)
    return RouterSums(
        load=load,
        probability=jnp.sum(p * counted[..., None], (0, 1)),
        squared_z=jnp.sum(jnp.square(jax.nn.logsumexp(logits, -1)) * counted),
        entropy=jax.lax.stop_gradient(jnp.sum(entropy * counted)),
        computed=jnp.sum(computed, dtype=jnp.float32),
        tokens=jnp.sum(counted),
    )


class Experts(nn.Module):
    """MLPs without biases, each applied to the tokens that chose it."""

    config: MoeConfig
    hidden_dim: int
    activation: str = "swiglu"
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, choice: jax.Array, weight: jax.Array):
        """(the weighted sum of the chosen experts' outputs, like x; which choices were computed).

        Args:
          x: [batch, length, embed].
          choice: [batch, length, choices] int32; num_experts for none.
          weight: [batch, length, choices].
        """
        shapes = {"up": (x.shape[-1], self.hidden_dim), "down": (self.hidden_dim, x.shape[-1])}
        if self.activation in GATED:
            shapes["gate"] = shapes["up"]
        kernels = {
            name: self._kernel(name, shape).astype(self.dtype) for name, shape in shapes.items()
        }
        return over_mesh(self.config, self.activation, kernels, x, choice, weight)

    def _kernel(self, name: str, shape: tuple[int, int]) -> jax.Array:
        scale = self.out_scale if name == "down" else 1.0
        init = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", batch_axis=0)
        return self.param(name, init, (self.config.num_experts, *shape), jnp.float32)


# Where things are on a mesh.


class Axes(NamedTuple):
    """Mesh axes over which things are split; empty where nothing is."""

    experts: tuple[str, ...] = ()  # experts, and the exchange of rows
    embed: tuple[str, ...] = ()  # kernels, gathered before use
    hidden: tuple[str, ...] = ()  # hidden width: outputs are summed over it
    out: tuple[str, ...] = ()  # last dimension of the sums: all of `hidden`, or nothing


def over_mesh(config, activation, kernels, x, choice, weight):
    """`compute` with each device of the mesh in use holding its part of tokens and experts.

    The sharding table says over which axes; those that do not divide a size are left out, and the
    devices along them compute the same.
    """
    run = functools.partial(compute, config, activation)
    if _on_one_device():
        return run(Axes(), kernels, x, choice, weight)
    axes = _axes(*kernels["up"].shape)
    up = PartitionSpec(axes.experts, axes.embed, axes.hidden)
    down = PartitionSpec(axes.experts, axes.hidden, axes.embed)
    tokens = _token_spec(x.shape)
    out, computed = jax.shard_map(
        functools.partial(run, axes),
        in_specs=({n: down if n == "down" else up for n in kernels}, tokens, tokens, tokens),
        out_specs=(PartitionSpec(*tokens, axes.out), tokens),
        axis_names=free_axes(),
        check_vma=False,
    )(kernels, x, choice, weight)
    return nn.with_logical_constraint(out, ("batch", "length", "activation_embed")), computed


def _on_one_device() -> bool:
    return all(axis_size(axis) == 1 for axis in free_axes())


def _token_spec(shape: tuple[int, ...]) -> PartitionSpec:
    """Of arrays [batch, length, ...]."""
    rows = (*split_over("batch", shape[0]), *whole_axes())
    return PartitionSpec(rows, split_over("length", shape[1]))


def _axes(experts: int, embed: int, hidden: int) -> Axes:
    over = split_over("mlp", hidden)
    divides = embed % math.prod(axis_size(axis) for axis in over) == 0
    return Axes(
        experts=split_over("experts", experts),
        embed=split_over("embed", embed),
        hidden=over,
        out=over if divides else (),
    )


def compute(config, activation, axes: Axes, kernels, x, choice, weight):
    """What `Experts` returns, for the tokens of one device.

    kernels are this device's experts; x, choice and weight its tokens.
    """
    if axes.embed:
        kernels = {
            name: jax.lax.all_gather(k, axes.embed, axis=2 if name == "down" else 1, tiled=True)
            for name, k in kernels.items()
        }
    apply = functools.partial(_mlp, kernels, activation)
    how = with_capacity if config.capacity_factor else dropless
    out, computed = how(axes.experts, config, apply, x, choice, weight)
    if axes.out:
        out = jax.lax.psum_scatter(out, axes.out, scatter_dimension=2, tiled=True)
    elif axes.hidden:
        out = jax.lax.psum(out, axes.hidden)
    return out, computed


def _mlp(kernels, activation, x, product):
    """The experts' MLP on rows x [..., embed]; product(rows, kernels [experts, in, out])."""
    gate = product(x, kernels["gate"]) if "gate" in kernels else None
    hidden = activate(product(x, kernels["up"]), gate, activation)
    return product(checkpoint_name(hidden, "mlp_hidden"), kernels["down"])


def with_capacity(axis, config, apply, x, choice, weight):
    """Each expert takes the first tokens of a group that chose it, best choices before second ones.

    Raises:
      ValueError: tokens that are not whole groups.
    """
    _, length, choices = choice.shape
    group = _group_size(config, length)
    capacity = min(group, math.ceil(config.capacity_factor * choices * group / config.num_experts))
    grouped = lambda a: a.reshape(-1, group, a.shape[-1])
    places = jax.vmap(lambda c: assign(c, config.num_experts, capacity))(grouped(choice))
    places = checkpoint_name(places, "places")
    sent = jax.vmap(to_slots)(grouped(x), places)  # [groups, experts x capacity, embed]
    received = _exchange(sent, axis, 1)  # [groups, devices x own experts x capacity, embed]
    by_expert = received.reshape(received.shape[0], _devices(axis), -1, capacity, x.shape[-1])
    product = lambda rows, kernels: jnp.einsum("gdeci,eio->gdeco", rows, kernels)
    made = apply(by_expert, product)
    returned = _exchange(made.reshape(received.shape), axis, 1)
    out, computed = jax.vmap(_weighted)(returned, places, grouped(weight))
    return out.reshape(x.shape), computed.reshape(choice.shape)


def _group_size(config, length: int) -> int:
    if config.group_size is None:
        return length
    group = min(config.group_size, length)
    if length % group:
        raise ValueError(f"--moe.group_size={group} does not divide the {length} tokens of a row")
    return group


def dropless(axis, config, apply, x, choice, weight):
    """Every choice is computed, unless the exchange between devices is bounded and too full."""
    tokens, choices = x.reshape(-1, x.shape[-1]), choice.reshape(-1, choice.shape[-1])
    devices = _devices(axis)
    if devices == 1:
        out, places = _sorted_by_expert(config.num_experts, apply, tokens, choices)
    else:
        own = config.num_experts // devices
        places = assign(choices // own, devices, _exchanged_rows(config, devices, *choices.shape))
        places = checkpoint_name(places, "places")
        # Rows go with the number of their expert on the device they go to; `own` marks no row.
        number = jnp.append((choices % own).T.reshape(-1), own)[places.source]
        received = _exchange(to_slots(tokens, places), axis, 0)
        numbers = _exchange(number, axis, 0)[:, None]
        made, inner = _sorted_by_expert(own, apply, received, numbers)
        out = _exchange(to_tokens(made, inner), axis, 0)
    out, computed = _weighted(out, places, weight.reshape(choices.shape))
    return out.reshape(x.shape), computed.reshape(choice.shape)


def _exchanged_rows(config, devices: int, tokens: int, choices: int) -> int:
    """Rows that go from one device to another at most: all that could, or as the factor says."""
    most = tokens * min(choices, config.num_experts // devices)
    if not config.exchange_factor:
        return most
    return min(most, math.ceil(config.exchange_factor * tokens * choices / devices))


def _sorted_by_expert(experts: int, apply, tokens, choices):
    """(outputs of all choices, sorted by expert; their places)."""
    places = checkpoint_name(assign(choices, experts, None), "places")
    sizes = jnp.sum(_one_hot(choices, experts), (0, 1), dtype=jnp.int32)
    product = lambda rows, kernels: grouped_matmul(rows, kernels, sizes)
    return apply(to_slots(tokens, places), product), places


def _devices(axis) -> int:
    return jax.lax.axis_size(axis) if axis else 1


def _exchange(rows, axis, dimension: int):
    """Part i of a dimension goes to device i; what comes from device i becomes part i."""
    if not axis:
        return rows
    return jax.lax.all_to_all(rows, axis, dimension, dimension, tiled=True)


def _weighted(outputs, places, weight):
    """(each token's sum of outputs [slots, embed] by weight [tokens, choices]; which there are)."""
    scaled = outputs * _weights_of_slots(weight, places)[:, None]
    return to_tokens(scaled.astype(outputs.dtype), places), (places.slot < outputs.shape[0]).T


# Tokens and slots: a partial matching, and what moves rows along it.


class Places(NamedTuple):
    """Which choice fills which slot. A choice is numbered choice x tokens + token."""

    source: jax.Array  # [slots] int32: the choice in a slot; tokens x choices if none
    slot: jax.Array  # [choices, tokens] int32: the slot of a choice; `slots` if it has none


def assign(bucket: jax.Array, buckets: int, capacity: int | None) -> Places:
    """Gives each choice a slot of its bucket, first choices and then first tokens first.

    Args:
      bucket: [tokens, choices] int32 in [0, buckets]; `buckets` is for a choice without a slot.
      buckets: how many there are.
      capacity: slots of a bucket, which begin at bucket x capacity. If None, there is a slot for
        every choice and the buckets follow each other without gaps.
    """
    tokens, choices = bucket.shape
    total = tokens * choices
    bucket = bucket.T.reshape(-1)
    rank, sizes = ranks(bucket, buckets)
    starts = jnp.cumsum(sizes) - sizes
    order = _stable_order(bucket, buckets)
    if capacity is None:
        slot = rank + jnp.sum(jnp.where(_one_hot(bucket, buckets), starts, 0), -1)
        slot = jnp.where(bucket < buckets, slot, total)
        source = jnp.where(jnp.arange(total) < jnp.sum(sizes), order, total)
        return Places(source, slot.reshape(choices, tokens))
    fits = (rank < capacity) & (bucket < buckets)
    slot = jnp.where(fits, bucket * capacity + rank, buckets * capacity)
    order = jnp.append(order, jnp.full(capacity, total, jnp.int32))
    source = jax.vmap(lambda start: jax.lax.dynamic_slice(order, (start,), (capacity,)))(starts)
    source = jnp.where(jnp.arange(capacity) < sizes[:, None], source, total)
    return Places(source.reshape(-1), slot.reshape(choices, tokens))


def ranks(bucket: jax.Array, buckets: int, block: int = 256) -> tuple[jax.Array, jax.Array]:
    """How many earlier entries of bucket [entries] are the same, and how many there are of each.

    Counted in blocks by a triangular matmul: sorting twice would be dearer, to run and to compile.
    An entry of `buckets` is not counted.
    """
    entries = bucket.shape[0]
    block = min(block, entries)  # few enough that float32 holds the sums, and bfloat16 the ones
    padded = jnp.pad(bucket, (0, -entries % block), constant_values=buckets)
    ones = _one_hot(padded.reshape(-1, block), buckets).astype(jnp.bfloat16)
    earlier = jnp.tri(block, k=-1, dtype=jnp.bfloat16)
    within = jnp.einsum("ij,bje->bie", earlier, ones, preferred_element_type=jnp.float32)
    of_block = jnp.sum(ones, 1, dtype=jnp.float32).astype(jnp.int32)
    before = jnp.cumsum(of_block, 0) - of_block
    found = (within.astype(jnp.int32) + before[:, None]) * ones.astype(jnp.int32)
    return jnp.sum(found, -1).reshape(-1)[:entries], jnp.sum(of_block, 0)


def _stable_order(bucket, buckets: int):
    """The stable argsort of bucket [entries], of values up to `buckets`."""
    entries = bucket.shape[0]
    number = jnp.arange(entries, dtype=jnp.int32)
    if (buckets + 1) * entries >= 2**31:
        return jnp.argsort(bucket, stable=True).astype(jnp.int32)
    # One operand and no ties: twice as fast to compile for TPUs.
    return jax.lax.sort(bucket * entries + number, is_stable=False) % entries


@jax.custom_vjp
def to_slots(tokens: jax.Array, places: Places) -> jax.Array:
    """[tokens, embed] -> [slots, embed]; 0 where a slot is empty. The transpose of `to_tokens`."""
    count = tokens.shape[0]
    empty = places.source >= places.slot.size
    index = jnp.where(empty, count, places.source % count)
    return tokens.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_tokens(rows: jax.Array, places: Places) -> jax.Array:
    """[slots, embed] -> [tokens, embed], each token the sum of its slots, made in float32."""
    mine = rows.at[places.slot].get(mode="fill", fill_value=0)
    return jnp.sum(mine, 0, dtype=jnp.promote_types(rows.dtype, jnp.float32)).astype(rows.dtype)


# Derived by jax, the transpose of either gather would be a scatter.
to_slots.defvjp(
    lambda tokens, places: (to_slots(tokens, places), places),
    lambda places, grad: (to_tokens(grad, places), None),
)
to_tokens.defvjp(
    lambda rows, places: (to_tokens(rows, places), places),
    lambda places, grad: (to_slots(grad, places), None),
)


@jax.custom_vjp
def _weights_of_slots(weight: jax.Array, places: Places) -> jax.Array:
    """[tokens, choices] -> [slots]; 0 where a slot is empty."""
    return jnp.append(weight.T.reshape(-1), 0)[places.source]


_weights_of_slots.defvjp(
    lambda weight, places: (_weights_of_slots(weight, places), places),
    lambda places, grad: (jnp.append(grad, 0)[places.slot].T, None),
)

"""The choices of a mixture of experts."""

import dataclasses

from genai_jax.config import field

SCORES = ("softmax", "sigmoid")
ROUTINGS = ("token_choice", "expert_choice")
# Options of token choice alone.
OF_TOKEN_CHOICE = (
    "renormalize", "capacity_factor", "group_size", "exchange_factor", "load_balance",
    "balance_rate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The experts of every block, their router, and the weights of its losses."""

    num_experts: int = field(
        0, "Number of experts that replace the MLP of every block; 0 keeps the MLP.", minimum=0
    )
    routing: str = field(
        "token_choice",
        "Whether a token chooses its experts, or an expert the tokens of a row, which gives all "
        "experts the same work and is for models that see both sides.",
        choices=ROUTINGS,
    )
    experts_per_token: int = field(
        2, "Number of experts that process each token; with expert_choice, on average.", minimum=1
    )
    expert_dim: int | None = field(
        None, "Hidden width of an expert; the width of the dense MLP if unset.", minimum=1
    )
    shared_experts: int = field(
        0, "Number of additional experts that process every token.", minimum=0
    )
    score: str = field(
        "softmax", "Function that turns the router's logits into scores.", choices=SCORES
    )
    renormalize: bool = field(
        True, "Whether the weights of a token's experts are normalized to sum to 1."
    )
    capacity_factor: float = field(
        0.0, "Tokens that an expert accepts, relative to an even share; 0 accepts all (dropless).",
        minimum=0,
    )  # fmt: skip
    group_size: int | None = field(
        None, "Number of consecutive tokens that share one capacity; a whole row if unset.",
        minimum=1,
    )  # fmt: skip
    exchange_factor: float = field(
        0.0, "Dropless routing: tokens that a device accepts from another, relative to an even "
        "share; 0 accepts all.", minimum=0,
    )  # fmt: skip
    load_balance: float = field(
        0.01, "Weight of the load-balancing loss, which is that of each microbatch.", minimum=0
    )
    balance_rate: float = field(
        0.0, "Step by which biases of the router's choices balance the experts without a loss; 0 "
        "for no biases.", minimum=0,
    )  # fmt: skip
    router_z_loss: float = field(0.001, "Weight of the router's squared log-normalizer.", minimum=0)

    def __post_init__(self):
        if not self.num_experts:
            for f in dataclasses.fields(self):
                if getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"{f.name}={getattr(self, f.name)} needs experts: set `num_experts`"
                    )
        elif self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}"
            )
        elif self.routing == "expert_choice":
            for f in dataclasses.fields(self):
                if f.name in OF_TOKEN_CHOICE and getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"{f.name}={getattr(self, f.name)} is for routing=token_choice, not "
                        "expert_choice"
                    )
        elif self.experts_per_token == 1 < self.num_experts and self.renormalize:
            raise ValueError(
                "experts_per_token=1 makes every renormalized weight 1, which leaves the router "
                "without a gradient: set renormalize=false"
            )
        if self.capacity_factor and self.exchange_factor:
            raise ValueError(
                f"exchange_factor={self.exchange_factor} is for dropless routing, without "
                f"capacity_factor={self.capacity_factor}"
            )

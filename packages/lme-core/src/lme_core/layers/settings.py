"""What a block's parts may ask of the architecture that holds them."""

from typing import Literal, Protocol

PositionEmbedding = Literal["rope", "learned_absolute", "nope"]
Normalization = Literal["rmsnorm", "layernorm", "p_norm"]
InitMethod = Literal["normal", "mup", "fan_in"]
RopeChannels = Literal["last", "first"]


class ModelSettings(Protocol):
    """The fields of an architecture's config that mixers, MLPs and layers read."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def normalization_function(self) -> Normalization:
        """Kind of the norms."""
        ...

    @property
    def layer_norm_epsilon(self) -> float:
        """Epsilon of the norms."""
        ...

    @property
    def zero_centered_norms(self) -> bool:
        """Whether norms hold the distance of their factors from 1."""
        ...

    @property
    def p_norm_order(self) -> float:
        """The p of `p_norm`."""
        ...

    @property
    def position_embedding_type(self) -> PositionEmbedding:
        """How the model knows positions."""
        ...

    @property
    def rope_channels(self) -> RopeChannels:
        """Which channels of a head rotate when not all do."""
        ...

    @property
    def initializer_range(self) -> float:
        """Base standard deviation of initial weights."""
        ...

    @property
    def init_method(self) -> InitMethod:
        """How the standard deviation follows from the range and the widths."""
        ...

    @property
    def use_depth_scaled_init(self) -> bool:
        """Whether output projections start smaller in deeper models."""
        ...

    @property
    def m_width(self) -> float | None:
        """Width multiplier of maximal update parametrisation."""
        ...

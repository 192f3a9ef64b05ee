"""What families with mixtures of experts share: rules of experts, and the fields of both configs."""

from typing import Any

from lme_convert.errors import UnsupportedModelError
from lme_convert.families.decoder import (
    LAYER,
    MLP,
    read_activation,
    read_mlp,
    single,
    uniform,
    write_activation,
    write_mlp,
)
from lme_convert.rules import Alternate, Chain, InGroups, Interleave, Rule, Stack, rename
from lme_convert.settings import Settings

# Of losses and noise in training, whatever the family.
_THEIR_IDLE = ("output_router_logits",)


def expert_rules(experts: str, *, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Rules of experts that are stored one by one.

    Args:
        experts: Their name of one expert, with `{e}`, without the layer.
        gate: Their name of its gate projection.
        up: The same of what the gate multiplies.
        down: The same of the second layer.
    """
    one = f"{LAYER}.{experts}"
    return (
        Rule(
            (f"{one}.{gate}.weight", f"{one}.{up}.weight"),
            (f"{MLP}.experts.gate_up.weight",),
            Chain((InGroups(Stack(), 2), Interleave(dim=1))),
        ),
        Rule((f"{one}.{down}.weight",), (f"{MLP}.experts.down.weight",), Stack()),
    )


def shared_rules(shared: str) -> tuple[Rule, ...]:
    """Rules of the expert that serves every token, named like an MLP of a Llama.

    Args:
        shared: Their name of it, without the layer.
    """
    gate_up = tuple(f"{LAYER}.{shared}.{name}_proj.weight" for name in ("gate", "up"))
    return (
        Rule(gate_up, (f"{MLP}.shared.gate_up.weight",), Interleave()),
        rename(f"{LAYER}.{shared}.down_proj.weight", f"{MLP}.shared.down.weight"),
    )


PACKED_RULES = (
    rename(f"{LAYER}.block_sparse_moe.router.layer.weight", f"{MLP}.router.weight"),
    Rule(
        (f"{LAYER}.block_sparse_moe.input_linear.weight",),
        (f"{MLP}.experts.gate_up.weight",),
        Alternate(dim=1),
    ),
    rename(f"{LAYER}.block_sparse_moe.output_linear.weight", f"{MLP}.experts.down.weight"),
)
"""Experts of Granite, all of a layer in one tensor, gates first."""

PACKED_SHARED_RULES = (
    Rule(
        (f"{LAYER}.shared_mlp.input_linear.weight",),
        (f"{MLP}.shared.gate_up.weight",),
        Alternate(),
    ),
    rename(f"{LAYER}.shared_mlp.output_linear.weight", f"{MLP}.shared.down.weight"),
)
"""The same of the MLP that serves every token."""


def read_mixture(theirs: Settings, *, experts: str, width: str) -> dict[str, Any]:
    """Read experts that a softmax chooses among.

    Args:
        theirs: Their settings.
        experts: Their name of the number of experts.
        width: Their name of an expert's width.

    Raises:
        UnsupportedModelError: For an activation whose gated form we do not have.
        ConversionError: If a field is missing or malformed.
    """
    theirs.drop(_THEIR_IDLE)
    return {
        "mlp_type": "MoE",
        "activation_function": read_activation(theirs),
        "intermediate_size": theirs.integer(width),
        "num_experts": theirs.integer(experts),
        "num_experts_per_tok": theirs.integer("num_experts_per_tok"),
        "normalized_topk": True,
        "add_bias": False,
    }


def write_mixture(ours: Settings, mlp: Settings, *, experts: str, width: str) -> dict[str, Any]:
    """Write experts; how they are chosen, and the shared one, are the family's to look at.

    Args:
        ours: Our settings.
        mlp: A block of ours.
        experts: As in `read_mixture`.
        width: As in `read_mixture`.

    Raises:
        UnsupportedModelError: For another kind of block or activation.
        ConversionError: If a field is missing or malformed.
    """
    mlp.expect("mlp_type", ("MoE",), default="MLP")
    mlp.drop(("dropout", "use_interleaved_weights"))
    return {
        "hidden_act": write_activation(mlp),
        width: mlp.integer("intermediate_size", 4 * ours.integer("hidden_size")),
        experts: mlp.integer("num_experts"),
        "num_experts_per_tok": mlp.integer("num_experts_per_tok"),
    }


def expect_softmax(mlp: Settings) -> None:
    """Refuse what routers other than the plain softmax do.

    Raises:
        UnsupportedModelError: Naming the setting and its value.
    """
    mlp.expect("router_score_function", ("softmax",), default="softmax")
    mlp.expect("routed_scaling_factor", (1,), default=1)
    for name in ("num_expert_groups", "num_groups_per_tok", "expert_bias_update_rate"):
        mlp.expect(name, (None,))


def read_aux_loss(theirs: Settings) -> dict[str, Any]:
    """Read the coefficient of the balancing loss: the number, each side's loss being its own."""
    return {"router_aux_loss_coef": theirs.number("router_aux_loss_coef", 0.001)}


def write_aux_loss(ours: Settings) -> dict[str, Any]:
    """Write the coefficient of the balancing loss."""
    given = ours.value("router_aux_loss_coef", 0.001)
    return {
        "router_aux_loss_coef": 0.0 if given is None else ours.number("router_aux_loss_coef", 0.001)
    }


def read_some_dense(
    theirs: Settings, mixture: dict[str, Any], num_layers: int
) -> list[dict[str, Any]]:
    """Read which layers are dense, in the Qwen families' spelling.

    Args:
        theirs: Their settings.
        mixture: The block of the other layers.
        num_layers: Number of layers.

    Raises:
        ConversionError: If a field is malformed.
    """
    step = theirs.integer("decoder_sparse_step", 1)
    named = theirs.layers("mlp_only_layers", num_layers)
    is_dense = [layer in named or (layer + 1) % step != 0 for layer in range(num_layers)]
    # Of no layer's where none is dense.
    dense = read_mlp(theirs) | {"add_bias": False}
    return single([dense if each else mixture for each in is_dense])


def write_some_dense(
    ours: Settings, *, experts: str, width: str
) -> tuple[dict[str, Any], Settings, list[int]]:
    """Write MLPs of which some may be dense; their class asks for a dense width anyway.

    Args:
        ours: Our settings.
        experts: As in `read_mixture`.
        width: As in `read_mixture`.

    Returns:
        Their fields, the block of the other layers, and which layers are dense.

    Raises:
        UnsupportedModelError: If no layer is a mixture, or blocks of a kind differ.
    """
    kinds = [entry.get("mlp_type") for entry in ours.entries("mlp_blocks")]
    dense = [layer for layer, kind in enumerate(kinds) if kind == "MLP"]
    others = [layer for layer, kind in enumerate(kinds) if kind != "MLP"]
    if not others:
        raise UnsupportedModelError(
            "`mlp_type` is 'MLP' in all of `mlp_blocks`; this family has mixtures of experts"
        )
    mlp = uniform(ours, "mlp_blocks", layers=others)
    config = write_mixture(ours, mlp, experts=experts, width=width)
    config["intermediate_size"] = config[width]
    if dense:
        block = uniform(ours, "mlp_blocks", layers=dense)
        of_dense = write_mlp(ours, block)
        block.refuse_rest()
        if of_dense["hidden_act"] != config["hidden_act"]:
            raise UnsupportedModelError(
                "`activation_function` of dense layers and of experts differ; this family has one"
            )
        config["intermediate_size"] = of_dense["intermediate_size"]
    return config, mlp, dense

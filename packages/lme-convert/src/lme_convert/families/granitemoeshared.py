"""Granite 3.x with mixtures of experts and an MLP that serves every token."""

from typing import Any

from lme_convert.families.decoder import DECODER_RULES, uniform
from lme_convert.families.granitemoe import read_granite_mixture, write_granite_mixture
from lme_convert.families.mixture import PACKED_RULES, PACKED_SHARED_RULES
from lme_convert.family import Family
from lme_convert.settings import Settings


def import_config(theirs: Settings) -> dict[str, Any]:
    """Granite's config to ours."""
    config = read_granite_mixture(theirs)
    # 0 is none.
    shared = theirs.integer("shared_intermediate_size", 0, minimum=0)
    config["mlp_blocks"][0]["shared_intermediate_size"] = shared or None
    theirs.warn_of_rest()
    return config


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Granite's."""
    mlp = uniform(ours, "mlp_blocks")
    config = write_granite_mixture(ours, mlp)
    config["shared_intermediate_size"] = mlp.optional_integer("shared_intermediate_size") or 0
    mlp.refuse_rest()
    return config


GRANITE_MOE_SHARED = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(*DECODER_RULES, *PACKED_RULES, *PACKED_SHARED_RULES),
)

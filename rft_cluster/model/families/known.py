"""Find a model's family."""

from typing import Any

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.model.families.family import Family
from rft_cluster.model.families.qwen2_5_vl import QWEN2_5_VL
from rft_cluster.model.families.qwen2_vl import QWEN2_VL
from rft_cluster.model.families.qwen3_vl import QWEN3_VL

FAMILIES = {family.model_type: family for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL)}
NOT_YET = {
    "qwen3_5": "three of four text layers are a recurrence, whose state the completions of a prompt would share",
}


def family_of(model_type: Any, where: object) -> Family:
    """The family with this `model_type` of a config.json. `where`: the model, for the message.

    Raises:
        UserError: it is none of `FAMILIES`.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(f"{family.name} ({name!r})" for name, family in FAMILIES.items())
    reason = f" ({NOT_YET[model_type]})" if isinstance(model_type, str) and model_type in NOT_YET else ""
    raise UserError(f"model.path: {where} is a {shown(repr(model_type))}, which is not supported{reason}: take {known}")

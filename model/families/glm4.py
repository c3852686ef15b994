"""GLM-4-0414 (Z.ai): GLM with norms before and after each block."""

from __future__ import annotations

from llm_edge.model.families.glm import glm_weights, read_glm_config
from llm_edge.model.family import Family

_POST_NORMS = {
    "attention_post_norm.weight": "post_self_attn_layernorm.weight",
    "mlp_post_norm.weight": "post_mlp_layernorm.weight",
}
FAMILY = Family(
    lambda raw: read_glm_config(raw, post_norm=True),
    lambda config, _: glm_weights(config, _POST_NORMS),
)

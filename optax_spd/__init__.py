"""Robust fine-tuning as Optax stages: adapt a pretrained model, keep what it knew."""

from optax_spd.anchor_edits import drop_anchor, set_anchor
from optax_spd.anchors import with_anchor
from optax_spd.l2_sp import l2_sp
from optax_spd.layers import LayerSpec, by_module, layer_names, outputs, stacked
from optax_spd.masks import path_mask
from optax_spd.recipes import adam_spd, adamw_l2_sp
from optax_spd.spd import spd
from optax_spd.wise_ft import wise_ft
from optax_spd.wrappers import chain, with_gradient

__all__ = [
    "LayerSpec",
    "adam_spd",
    "adamw_l2_sp",
    "by_module",
    "chain",
    "drop_anchor",
    "l2_sp",
    "layer_names",
    "outputs",
    "path_mask",
    "set_anchor",
    "spd",
    "stacked",
    "wise_ft",
    "with_anchor",
    "with_gradient",
]

__version__ = "0.1.0"

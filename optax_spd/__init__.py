"""Robust fine-tuning as Optax stages: adapt a pretrained model, keep what it knew."""

from optax_spd.anchor_edits import drop_anchor, set_anchor
from optax_spd.anchors import with_anchor
from optax_spd.fit_radii import fit_radii
from optax_spd.ftp import ftp
from optax_spd.l2_sp import l2_sp
from optax_spd.layers import LayerSpec, by_module, layer_names, outputs, stacked
from optax_spd.masks import path_mask
from optax_spd.projected_recipes import adam_ftp, adam_tpgm, sgd_ftp
from optax_spd.projections import project
from optax_spd.recipes import adam_spd, adamw_l2_sp
from optax_spd.spd import spd
from optax_spd.tpgm import tpgm
from optax_spd.wise_ft import wise_ft
from optax_spd.wrappers import chain, with_gradient

__all__ = [
    "LayerSpec",
    "adam_ftp",
    "adam_spd",
    "adam_tpgm",
    "adamw_l2_sp",
    "by_module",
    "chain",
    "drop_anchor",
    "fit_radii",
    "ftp",
    "l2_sp",
    "layer_names",
    "outputs",
    "path_mask",
    "project",
    "set_anchor",
    "sgd_ftp",
    "spd",
    "stacked",
    "tpgm",
    "wise_ft",
    "with_anchor",
    "with_gradient",
]

__version__ = "0.1.0"

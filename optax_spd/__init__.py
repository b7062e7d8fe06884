"""Robust fine-tuning as Optax stages: adapt a pretrained model, keep what it knew."""

from optax_spd.anchor_edits import drop_anchor, set_anchor
from optax_spd.anchors import with_anchor
from optax_spd.balance_scales import balance_scales
from optax_spd.embeddings import DEFAULT_EMBEDDING_PATTERNS
from optax_spd.fit_radii import fit_radii
from optax_spd.freezing import sgd_freeze_embed, with_frozen
from optax_spd.ftp import ftp
from optax_spd.l2_sp import l2_sp
from optax_spd.layer_decay import layerwise_lr_decay
from optax_spd.layers import LayerSpec, by_module, outputs, stacked
from optax_spd.masks import path_mask
from optax_spd.plans import layer_names
from optax_spd.power_law import power_law_alpha
from optax_spd.projected_recipes import adam_ftp, adam_tpgm, sgd_ftp
from optax_spd.projections import project
from optax_spd.recipes import adam_spd, adamw_l2_sp
from optax_spd.spd import spd
from optax_spd.temp_balance import temp_balance
from optax_spd.tpgm import tpgm
from optax_spd.wise_ft import wise_ft
from optax_spd.wrappers import chain, with_gradient

__all__ = [
    "DEFAULT_EMBEDDING_PATTERNS",
    "LayerSpec",
    "adam_ftp",
    "adam_spd",
    "adam_tpgm",
    "adamw_l2_sp",
    "balance_scales",
    "by_module",
    "chain",
    "drop_anchor",
    "fit_radii",
    "ftp",
    "l2_sp",
    "layer_names",
    "layerwise_lr_decay",
    "outputs",
    "path_mask",
    "power_law_alpha",
    "project",
    "set_anchor",
    "sgd_freeze_embed",
    "sgd_ftp",
    "spd",
    "stacked",
    "temp_balance",
    "tpgm",
    "wise_ft",
    "with_anchor",
    "with_frozen",
    "with_gradient",
]

__version__ = "0.1.0"

"""Robust fine-tuning as Optax stages: adapt a pretrained model, keep what it knew.

Every method here is a stage for ``optax.chain``. It changes an optimizer's update so that the
parameters stay near an *anchor*, the pretrained weights. The recipes are complete optimizers.

Recipes: ``adam_spd``, ``adamw_l2_sp``, ``adam_tpgm``, ``adam_ftp``, ``sgd_ftp``,
``adamp``, ``sgdp``, ``sgd_fednar``, ``sgd_freeze_embed``.

Stages: ``spd``, ``tpgm``, ``ftp``, ``l2_sp``, ``temp_balance``, ``layerwise_lr_decay``,
``auto_rgn``, ``remove_radial``, ``clip_by_relative_norm``, ``path_prox``; a stage of your own:
``layerwise``, ``Decision``.

Wrappers: ``chain`` and ``with_gradient`` pass the raw gradient to the stages, ``with_anchor``
shares one anchor, ``with_frozen`` freezes parameters, ``with_sparse`` trains few entries of each
layer (``sparse_mask`` shows which).

After training: ``project``, ``fit_radii``, ``wise_ft``, ``lines_alpha``.

States: ``set_anchor``, ``drop_anchor``, ``check_state``; the classes ``SPDState``, ``TPGMState``,
``FTPState``, ``L2SPState``, ``PathProxState``, ``TempBalanceState``, ``LayerDecayState``,
``AutoRGNState``, ``WithAnchorState``, ``WithSparseState``, ``LayerwiseState``.

Layers: ``LayerSpec``, ``stacked``, ``outputs``, ``by_module``, ``layer_names``, ``path_mask``,
``DEFAULT_EMBEDDING_PATTERNS``.

Reports: ``layer_report``, and its pictures ``plot_report``, ``plot_layers``; the classes
``LayerReport``, ``LayerRow``.

Parts of TempBalance: ``power_law_alpha``, ``balance_scales``.
"""

from optax_spd.anchors.edit import drop_anchor, set_anchor
from optax_spd.core.decisions import Decision
from optax_spd.core.layerwise import LayerwiseState, layerwise
from optax_spd.layers.embeddings import DEFAULT_EMBEDDING_PATTERNS
from optax_spd.layers.fingerprints import check_state
from optax_spd.layers.masks import path_mask
from optax_spd.layers.plans import layer_names
from optax_spd.layers.spec import LayerSpec, by_module, outputs, stacked
from optax_spd.methods.adamp.stage import remove_radial
from optax_spd.methods.auto_rgn import AutoRGNState, auto_rgn
from optax_spd.methods.freezing import with_frozen
from optax_spd.methods.ftp import FTPState, ftp
from optax_spd.methods.l2_sp import L2SPState, l2_sp
from optax_spd.methods.layer_decay import LayerDecayState, layerwise_lr_decay
from optax_spd.methods.path_prox import PathProxState, path_prox
from optax_spd.methods.relative_clip import clip_by_relative_norm
from optax_spd.methods.sparse.state import WithSparseState, sparse_mask
from optax_spd.methods.sparse.wrapper import with_sparse
from optax_spd.methods.spd import SPDState, spd
from optax_spd.methods.temp_balance.power_law import power_law_alpha
from optax_spd.methods.temp_balance.scales import balance_scales
from optax_spd.methods.temp_balance.stage import TempBalanceState, temp_balance
from optax_spd.methods.tpgm import TPGMState, tpgm
from optax_spd.plotting import plot_layers, plot_report
from optax_spd.posthoc.fit_radii import fit_radii
from optax_spd.posthoc.lines import lines_alpha
from optax_spd.posthoc.project import project
from optax_spd.posthoc.wise_ft import wise_ft
from optax_spd.recipes import (
    adam_ftp,
    adam_spd,
    adam_tpgm,
    adamp,
    adamw_l2_sp,
    sgd_fednar,
    sgd_freeze_embed,
    sgd_ftp,
    sgdp,
)
from optax_spd.report import LayerReport, LayerRow, layer_report
from optax_spd.wrappers import WithAnchorState, chain, with_anchor, with_gradient

# Sorted; the docstring lists the names by kind.
__all__ = [
    "DEFAULT_EMBEDDING_PATTERNS",
    "AutoRGNState",
    "Decision",
    "FTPState",
    "L2SPState",
    "LayerDecayState",
    "LayerReport",
    "LayerRow",
    "LayerSpec",
    "LayerwiseState",
    "PathProxState",
    "SPDState",
    "TPGMState",
    "TempBalanceState",
    "WithAnchorState",
    "WithSparseState",
    "adam_ftp",
    "adam_spd",
    "adam_tpgm",
    "adamp",
    "adamw_l2_sp",
    "auto_rgn",
    "balance_scales",
    "by_module",
    "chain",
    "check_state",
    "clip_by_relative_norm",
    "drop_anchor",
    "fit_radii",
    "ftp",
    "l2_sp",
    "layer_names",
    "layer_report",
    "layerwise",
    "layerwise_lr_decay",
    "lines_alpha",
    "outputs",
    "path_mask",
    "path_prox",
    "plot_layers",
    "plot_report",
    "power_law_alpha",
    "project",
    "remove_radial",
    "set_anchor",
    "sgd_fednar",
    "sgd_freeze_embed",
    "sgd_ftp",
    "sgdp",
    "sparse_mask",
    "spd",
    "stacked",
    "temp_balance",
    "tpgm",
    "wise_ft",
    "with_anchor",
    "with_frozen",
    "with_gradient",
    "with_sparse",
]  # fmt: skip

__version__ = "0.1.0"

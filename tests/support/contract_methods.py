"""The methods of the contract suite: one line for each public stage, wrapper and recipe.

Every test in tests/contract/ runs on every line of ``METHODS``. A new method joins by a new line.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import docs_examples
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_spd

Maker = Callable[..., optax.GradientTransformationExtraArgs]
RATE = 0.1


class Method(NamedTuple):
    """How to make one method, and what is special about it.

    Attributes:
      build: the public function, or a small factory around it.
      numbers: hyperparameters that may be schedules and may change between steps.
      fixed: its other arguments.
      vectors: the fields of its state with one number for each layer.
      place: puts a stage into a complete optimizer.
      inner: the optimizer without the method.
      gradient: whether the bare method needs ``grad=``.
      validates: whether steps pass it ``validation_fn`` and ``validation_batches``.
      mask: which arrays its layers are, if not all.
      excepted: properties that do not hold for it, each with the reason.
    """

    build: Maker
    numbers: Mapping[str, float]
    fixed: Mapping[str, Any] = {}
    vectors: tuple[str, ...] = ()
    place: Callable[[Any], Any] = lambda tx: tx
    inner: Callable[[], Any] = lambda: optax.adam(RATE)
    gradient: bool = False
    validates: bool = False
    mask: Any = None
    excepted: Mapping[str, str] = {}

    def takes(self, option: str) -> bool:
        """Whether the method has an argument of this name."""
        return option in inspect.signature(self.build).parameters

    def stage(self, **options: Any) -> Any:
        """The bare method, with those of the options that it takes."""
        taken = {name: value for name, value in options.items() if self.takes(name)}
        return self.build(**{**self.numbers, **self.fixed, **taken})

    def optimizer(self, **options: Any) -> Any:
        """A complete optimizer that needs no extra arguments but validation data."""
        return self.place(self.stage(**options))

    @property
    def is_stage(self) -> bool:
        """Whether it stands in a chain."""
        return self.place in (after_adam, before_adam, inside_adam, before_sgd)

    @property
    def is_wrapper(self) -> bool:
        """Whether the line's factory is written for the table, around a public wrapper."""
        return self.build.__module__ == __name__

    @property
    def has_anchor(self) -> bool:
        """Whether its state holds an anchor."""
        return self.takes("anchor")


# Where a stage stands, in a chain that passes it the gradient or in one that does not.


def after_adam(stage: Any, chain: Any = optax_spd.chain) -> Any:
    return chain(optax.adam(RATE), stage)


def before_adam(stage: Any, chain: Any = optax_spd.chain) -> Any:
    return chain(stage, optax.adam(RATE))


def inside_adam(stage: Any, chain: Any = optax_spd.chain) -> Any:
    return chain(optax.scale_by_adam(), stage, optax.scale_by_learning_rate(RATE))


def before_sgd(stage: Any, chain: Any = optax_spd.chain) -> Any:
    return chain(stage, sgd())


def sgd() -> Any:
    return optax.sgd(RATE, momentum=0.9)


def shared_anchor(
    l2_sp_decay: Any = 0.1,
    spd_decay: Any = 1.0,
    anchor: Any = "initial",
    anchor_dtype: Any = None,
    layers: Any = None,
) -> Any:
    """Two stages that share one anchor."""
    stages = optax.chain(
        optax_spd.l2_sp(l2_sp_decay, anchor="argument"),
        optax.adam(RATE),
        optax_spd.spd(spd_decay, anchor="argument", layers=layers),
    )
    return optax_spd.with_gradient(optax_spd.with_anchor(stages, anchor, anchor_dtype))


def frozen_embedding(weight_decay: Any = 1.0, anchor: Any = "initial", layers: Any = None) -> Any:
    """A recipe of which one array is frozen."""
    recipe = optax_spd.adam_spd(RATE, weight_decay=weight_decay, anchor=anchor, layers=layers)
    return optax_spd.with_frozen(recipe, "^embed")


def sparse_spd(weight_decay: Any = 1.0, layers: Any = None) -> Any:
    """A recipe that trains some entries of each layer."""
    recipe = optax_spd.adam_spd(RATE, weight_decay=weight_decay, layers=layers)
    return optax_spd.with_sparse(recipe, 0.3, layers=layers)


def not_embedding(params: Any) -> Any:
    """A mask; a path_mask would refuse parts of the tree that a pattern does not match."""
    return jax.tree.map_with_path(lambda path, _: "embed" not in jax.tree_util.keystr(path), params)


@functools.cache
def own_method() -> Maker:
    """The method that docs/own_method.md writes with ``layerwise``."""
    page = docs_examples.ROOT / "docs" / "own_method.md"
    made: Maker = docs_examples.run(page, first=1)["cosine_decay"]
    return made


def cosine_decay(
    weight_decay: Any = 0.1, smoothing: Any = 0.5, anchor: Any = "initial",
    anchor_dtype: Any = None, layers: Any = None, mask: Any = None, axis_name: Any = None,
) -> Any:  # fmt: skip
    return own_method()(
        weight_decay, smoothing, anchor=anchor, anchor_dtype=anchor_dtype, layers=layers,
        mask=mask, axis_name=axis_name,
    )  # fmt: skip


def path_prox(
    learning_rate: Any = RATE, weight_decay: Any = 1.0, regularize_bias: bool = False
) -> optax.GradientTransformationExtraArgs:
    """A pair of the embedding and the head, which is transposed so that its inputs are the units.

    Or of the two kernels of a tree that has blocks only.
    """
    tx = optax_spd.path_prox(
        learning_rate, weight_decay, [(r"embed|blocks(_0/|/0$)", r"head|blocks(_1/|/1$)")],
        regularize_bias=regularize_bias,
    )  # fmt: skip

    def transposed(path: Any, leaf: Any) -> Any:
        if "head" not in jax.tree_util.keystr(path) or getattr(leaf, "ndim", 0) != 2:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)
        return leaf.T

    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    flipped = functools.partial(jax.tree.map_with_path, transposed, is_leaf=is_masked)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        updates, state = tx.update(flipped(updates), state, flipped(params), **extra_args)
        return flipped(updates), state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(flipped(params)), update)


# The number of a block, stacked (blocks/kernel[1]) or not (blocks/1/kernel).
DEPTH = r"blocks\D*(\d+)"

EAGER = {"eager": "JAX compiles an eager cond or scan anew, with the functions inside"}
NORMALIZES = {"isolation": "the scales of all layers are relative to each other"}
PAIRS = {
    "no layers": "a pattern that matches no kernel is an error",
    "parts": "so is a pair that is split between parts of a tree",
}
WHOLE_NORM = {"isolation": "arrays are clipped by a norm over all of them"}
NEEDS_LAYERS = {"no layers": "a depth that matches no layer is an error"}
SHAPED = EAGER | {
    "symbolic shapes": "how many entries are chosen follows from the shapes",
    "parameter-like": "its inner state holds vectors, and is one non-parameter",
    "split anchor": "its anchor holds the chosen entries only, whole on each device",
}
LEARNED = EAGER | {
    "isolation": "all radii are learned from one validation loss, which is NaN then",
    "half precision": "the validation loss is computed in the parameters' dtype",
}

SPD, FTP, TPGM = ("spd_ratio",), ("ftp_radii",), ("tpgm_radii",)
RGN = ("auto_rgn_scale", "auto_rgn_ratio")
BALANCE, DEPTHS = ("temp_balance_scale", "temp_balance_alpha"), ("layer_decay_scale",)
DECAY, K = {"weight_decay": 1.0}, {"k": 0.5, "radius_learning_rate": 0.1}
LR, SCALES = {"learning_rate": RATE}, {"min_scale": 0.5, "max_scale": 1.5}
LEARNS = {"radius_optimizer": optax.sgd(0.05)}
# Of the kernels some pass AdamP's test by rows, some as a whole, and some do not.
RADIAL = {"weight_decay": 0.3, "delta": 1.2, "wd_ratio": 0.5}
RELATIVE = LR | {"weight_decay": 0.1, "clipping": 0.5}
MASKED = {"anchor_dtype": jnp.bfloat16, "mask": not_embedding}
VALIDATES = {"validates": True, "excepted": LEARNED}

# fmt: off
METHODS: dict[str, Method] = {
    "spd": Method(optax_spd.spd, DECAY, {}, SPD, after_adam, gradient=True),
    "ftp": Method(optax_spd.ftp, K, {"norm": "l2"}, FTP, after_adam, gradient=True),
    "tpgm": Method(optax_spd.tpgm, {}, {"radii": 0.2}, (), after_adam),
    "tpgm, learned": Method(
        optax_spd.tpgm, {}, LEARNS | {"every": 2, "norm": "l2"}, TPGM, after_adam, **VALIDATES
    ),
    "l2_sp": Method(optax_spd.l2_sp, {"weight_decay": 0.3}, place=before_adam),
    "l2_sp, cautious": Method(
        optax_spd.l2_sp, {"weight_decay": 0.3}, {"cautious": True}, place=before_adam
    ),
    "path_prox": Method(path_prox, LR | {"weight_decay": 1.0}, {}, (), after_adam, excepted=PAIRS),
    "layerwise": Method(
        cosine_decay, {"weight_decay": 0.3, "smoothing": 0.5}, {}, ("cosine", "average_cosine"),
        after_adam, gradient=True, excepted={"sign": "the driver cannot know a number's range"},
    ),
    "temp_balance": Method(
        optax_spd.temp_balance, SCALES, {"every": 2, "min_eigenvalues": 2}, BALANCE, after_adam,
        excepted=NORMALIZES | EAGER,
    ),
    "layerwise_lr_decay": Method(
        optax_spd.layerwise_lr_decay, {"decay": 0.5, "min_scale": 0.2}, {"depth": DEPTH}, DEPTHS,
        after_adam, excepted=NEEDS_LAYERS,
    ),
    "auto_rgn": Method(
        optax_spd.auto_rgn, {}, {"every": 2}, RGN, after_adam, gradient=True, excepted=NORMALIZES
    ),
    "remove_radial": Method(
        optax_spd.remove_radial, RADIAL, {}, place=inside_adam, gradient=True
    ),
    "clip_by_relative_norm": Method(
        optax_spd.clip_by_relative_norm, RELATIVE, place=before_sgd, inner=sgd, excepted=WHOLE_NORM
    ),
    "with_anchor": Method(shared_anchor, {"l2_sp_decay": 0.1, "spd_decay": 1.0}, {}, SPD),
    "with_frozen": Method(frozen_embedding, DECAY, {}, SPD, mask=not_embedding),
    "with_sparse": Method(sparse_spd, DECAY, {}, SPD, excepted=SHAPED),
    "adam_spd": Method(optax_spd.adam_spd, LR | DECAY, {}, SPD),
    "adam_spd, masked": Method(optax_spd.adam_spd, LR | DECAY, MASKED, SPD, mask=not_embedding),
    "adamw_l2_sp": Method(optax_spd.adamw_l2_sp, LR | {"weight_decay": 0.5}),
    "adam_ftp": Method(
        optax_spd.adam_ftp, LR | K | {"weight_decay": 0.1}, {"state_dtype": jnp.bfloat16}, FTP
    ),
    "sgd_ftp": Method(
        optax_spd.sgd_ftp, LR | K, {"momentum": 0.9, "nesterov": True}, FTP, inner=sgd
    ),
    "adam_tpgm": Method(optax_spd.adam_tpgm, LR, LEARNS, TPGM, **VALIDATES),
    "adamp": Method(optax_spd.adamp, LR | RADIAL, {"nesterov": True}),
    "sgdp": Method(optax_spd.sgdp, LR | RADIAL, {"momentum": 0.6, "dampening": 0.2}, inner=sgd),
    "sgd_fednar": Method(
        optax_spd.sgd_fednar, LR | {"weight_decay": 0.5, "max_norm": 3.0},
        {"momentum": 0.9, "anchor": "initial"}, inner=sgd, excepted=WHOLE_NORM,
    ),
    "sgd_freeze_embed": Method(optax_spd.sgd_freeze_embed, LR, inner=sgd),
}
# fmt: on


def every_method(
    property_name: str = "", where: Callable[[Method], bool] = lambda method: True
) -> pytest.MarkDecorator:
    """Runs a test on every method that the property is said to hold for.

    Args:
      property_name: methods that except this property are left out.
      where: which methods the property concerns at all.
    """
    names = [n for n, m in METHODS.items() if where(m) and property_name not in m.excepted]
    return pytest.mark.parametrize("name", names)


def public_makers() -> set[str]:
    """The public functions that return a gradient transformation."""
    made = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)
    public = {name: getattr(optax_spd, name) for name in optax_spd.__all__}
    return {
        name
        for name, function in public.items()
        if inspect.isfunction(function) and inspect.signature(function).return_annotation in made
    }


def documented_static_args(function: Any) -> tuple[str, ...]:
    """What a docstring says to name in ``static_args`` of ``optax.inject_hyperparams``."""
    told = function.__doc__.split("optax.inject_hyperparams``")[1]
    sentence = re.split(r"\.\s", told)[0]
    return tuple(n for n in re.findall(r"``(\w+)``", sentence) if n != "static_args")


@functools.cache
def optimizer(name: str) -> Any:
    """The complete optimizer of a line, made once for all tests, for the model below."""
    return METHODS[name].optimizer(layers=optax_spd.stacked("^blocks/"))


def half_distance(params: Any, batch: Any) -> jax.Array:
    """A validation loss: half the squared distance to the batch."""
    parts = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2) / 2, params, batch)
    return jnp.stack(jax.tree.leaves(parts)).sum()


def validation(name: str, params: Any) -> dict[str, Any]:
    """The extra arguments of a step."""
    if not METHODS[name].validates:
        return {}
    batches = jax.tree.map(lambda x: jnp.stack([2 * x, -x / 2]), params)
    return {"validation_fn": half_distance, "validation_batches": batches}

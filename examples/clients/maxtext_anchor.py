"""MaxText: pretrains a tiny decoder, then fine-tunes it with SPD; saves, and resumes.

MaxText loads ``load_parameters_path`` after ``tx.init``, so the anchor is a random init until
``set_anchor``. Its wheel asks for no packages on a CPU; it carries a list of them, to install with
``pip install -r dependencies/requirements/base_requirements/requirements.txt`` in site-packages.
"""

import tempfile
from typing import Any

import jax
import maxtext
import numpy as np
from flax import nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train
from maxtext.utils import train_utils

import optax_spd

# A decoder of 3 layers, 35,040 parameters, on MaxText's synthetic tokens.
TINY = """hardware=cpu skip_jax_distributed_system=true log_config=false attention=dot_product
    base_emb_dim=32 base_mlp_dim=64 base_num_query_heads=2 base_num_kv_heads=2 head_dim=16
    base_num_decoder_layers=3 vocab_size=64 max_target_length=32 per_device_batch_size=2
    dataset_type=synthetic learning_rate=1e-2 learning_rate_schedule_steps=8
    checkpoint_period=3 async_checkpointing=false enable_goodput_recording=false"""
LAYERS = optax_spd.stacked("^decoder/layers/", axis=1)  # MaxText scans on axis 1


def run(name: str, directory: str, **options: Any) -> Any:
    named = {"run_name": name, "base_output_directory": directory, **options}
    base = f"{maxtext.__path__[0]}/configs/base.yml"
    config = ["", base, *TINY.split(), *(f"{key}={value}" for key, value in named.items())]
    return train.train_loop(*train.initialize(config))


def main() -> dict[str, Any]:
    setup, adamw, distances, graphs = train_utils.setup_train_loop, optimizers.get_optimizer, [], []

    def with_anchor(*args: Any, **kwargs: Any) -> Any:
        found = setup(*args, **kwargs)
        model, optimizer = found[-1].model, found[-1].optimizer
        params = nnx.state(model, nnx.Param)
        report = optax_spd.layer_report(params, state=optimizer.opt_state, layers=LAYERS)
        distances.append(report.total)
        if optimizer.step[...] == 0:  # a new run: a resumed one has the right anchor
            optimizer.opt_state = optax_spd.set_anchor(optimizer.opt_state, params)
        graphs.append(nnx.graphdef(found[-1]))
        return found

    def spd(_config: Any, schedule: Any, *_: Any, **__: Any) -> Any:
        return optax_spd.adam_spd(schedule, layers=LAYERS)

    with tempfile.TemporaryDirectory() as directory:
        run("pretraining", directory, steps=4)
        optimizers.get_optimizer, train_utils.setup_train_loop = spd, with_anchor
        try:
            pretrained = f"{directory}/pretraining/checkpoints/3/items"
            straight = run("straight", directory, steps=8, load_parameters_path=pretrained)
            run("split", directory, steps=4, load_parameters_path=pretrained)
            resumed = run("split", directory, steps=8, load_parameters_path=pretrained)
        finally:
            optimizers.get_optimizer, train_utils.setup_train_loop = adamw, setup
    end = nnx.merge(graphs[-1], resumed)
    params, state = nnx.state(end.model, nnx.Param), end.optimizer.opt_state
    optax_spd.check_state(state, params, layers=LAYERS)
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ends = [[x for x in jax.tree.leaves(end) if not is_key(x)] for end in (straight, resumed)]
    result = {
        "before_set_anchor": distances[0],
        "distance": optax_spd.layer_report(params, state=state, layers=LAYERS).total,
        "layers": len(optax_spd.layer_names(params, layers=LAYERS)),
        "restart_equal": all(map(np.array_equal, *ends)),
    }
    print("  ".join(f"{key} {value}" for key, value in result.items()))
    return result


if __name__ == "__main__":
    main()

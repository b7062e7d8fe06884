"""The default patterns against parameter paths of real models, and against two modules of Flax.

The paths are written down from the models' code, which each entry names.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx

import optax_spd

(PATTERN,) = optax_spd.DEFAULT_EMBEDDING_PATTERNS


class Model(NamedTuple):
    """Parameter paths of a model, the embedding layer's and some of the others."""

    embedding: list[str]
    others: list[str]


BERT = [
    "embeddings/word_embeddings/embedding",
    "embeddings/position_embeddings/embedding",
    "embeddings/token_type_embeddings/embedding",
    "embeddings/LayerNorm/scale",
    "embeddings/LayerNorm/bias",
]
BERT_LAYER = [
    "encoder/layer/0/attention/self/query/kernel",
    "encoder/layer/0/attention/output/LayerNorm/scale",
    "encoder/layer/0/intermediate/dense/kernel",
    "encoder/layer/11/output/LayerNorm/bias",
    "pooler/dense/kernel",
]
VIT_BLOCK = [
    "Transformer/encoderblock_0/LayerNorm_0/scale",
    "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel",
    "Transformer/encoderblock_11/MultiHeadDotProductAttention_0/query/kernel",
    "Transformer/encoder_norm/bias",
]
GPT2_BLOCK = ["h/0/ln_1/scale", "h/0/attn/c_attn/kernel", "h/11/mlp/c_proj/kernel", "ln_f/scale"]
CLIP_LAYER = [
    "encoder/layers/0/self_attn/q_proj/kernel",
    "encoder/layers/0/layer_norm1/scale",
    "encoder/layers/11/mlp/fc2/bias",
]


def under(module: str, paths: list[str]) -> list[str]:
    return [f"{module}/{path}" for path in paths]


LINEN = {
    # google-research/vision_transformer, vit_jax/models_vit.py
    "ViT, vision_transformer": Model(
        ["cls", "embedding/kernel", "embedding/bias", "Transformer/posembed_input/pos_embedding"],
        [*VIT_BLOCK, "pre_logits/kernel", "head/kernel", "head/bias"],
    ),
    # google-research/big_vision, big_vision/models/vit.py
    "ViT, big_vision": Model(
        ["cls", "embedding/kernel", "embedding/bias", "pos_embedding"],
        [
            *VIT_BLOCK,
            "MAPHead_0/probe",
            "MAPHead_0/MlpBlock_0/Dense_1/kernel",
            "MAPHead_0/MultiHeadDotProductAttention_0/out/kernel",
            "head/kernel",
        ],
    ),
    # google-research/big_vision, proj/image_text/two_towers.py and text_transformer.py
    "two towers, big_vision": Model(
        ["img/embedding/kernel", "img/pos_embedding", "txt/Embed_0/embedding", "txt/pos_embedding"],
        ["txt/Encoder_0/encoderblock_0/MlpBlock_0/Dense_0/kernel", "txt/head/kernel", "t", "b"],
    ),
    # google-research/scenic, scenic/projects/baselines/vit.py
    "ViT, Scenic": Model(
        ["cls", "embedding/kernel", "Transformer/posembed_input/pos_embedding"],
        [*VIT_BLOCK, "output_projection/kernel"],
    ),
    # huggingface/transformers, models/vit/modeling_flax_vit.py
    "ViT, Hugging Face": Model(
        under(
            "vit/embeddings",
            [
                "cls_token",
                "position_embeddings",
                "patch_embeddings/projection/kernel",
                "patch_embeddings/projection/bias",
            ],
        ),
        [
            "vit/encoder/layer/0/attention/attention/query/kernel",
            "vit/encoder/layer/0/layernorm_before/scale",
            "vit/layernorm/scale",
            "classifier/kernel",
        ],
    ),
    # huggingface/transformers, models/bert/modeling_flax_bert.py; the head is called cls
    "BERT, Hugging Face": Model(
        under("bert", BERT),
        [
            *under("bert", BERT_LAYER),
            "cls/predictions/bias",
            "cls/predictions/transform/dense/kernel",
            "cls/predictions/transform/LayerNorm/scale",
            "cls/seq_relationship/kernel",
            "classifier/kernel",
        ],
    ),
    # huggingface/transformers, models/roberta/modeling_flax_roberta.py
    "RoBERTa, Hugging Face": Model(
        under("roberta", BERT),
        [*under("roberta", BERT_LAYER), "lm_head/dense/kernel", "lm_head/layer_norm/scale"],
    ),
    # huggingface/transformers, models/electra/modeling_flax_electra.py
    "ELECTRA, Hugging Face": Model(
        [*under("electra", BERT), "electra/embeddings_project/kernel"],
        [*under("electra", BERT_LAYER), "discriminator_predictions/dense/kernel"],
    ),
    # google-research/scenic, scenic/projects/baselines/bert/layers.py
    "BERT, Scenic": Model(
        [
            "stem/word_embedding/embedding",
            "stem/type_embedding/embedding",
            "stem/posembed_input/pos_embedding",
            "stem/embedding_norm/scale",
        ],
        ["encoder/encoderblock_0/LayerNorm_0/scale", "masked_lm_head/embedding_bias"],
    ),
    # huggingface/transformers, models/gpt2/modeling_flax_gpt2.py
    "GPT-2, Hugging Face": Model(
        ["transformer/wte/embedding", "transformer/wpe/embedding"],
        [*under("transformer", GPT2_BLOCK), "lm_head/kernel"],
    ),
    # openai/gpt-2's variables as plain arrays: wte and wpe have no module of their own
    "GPT-2, plain": Model(["wte", "wpe"], ["h0/ln_1/g", "h0/attn/c_attn/w", "ln_f/b"]),
    # huggingface/transformers, models/t5/modeling_flax_t5.py
    "T5, Hugging Face": Model(
        ["shared/embedding"],
        [
            "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding",
            "encoder/block/0/layer/0/SelfAttention/q/kernel",
            "encoder/block/0/layer/1/DenseReluDense/wi_0/kernel",
            "encoder/final_layer_norm/weight",
            "decoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding",
            "decoder/block/11/layer/1/EncDecAttention/o/kernel",
            "lm_head/kernel",
        ],
    ),
    # google-research/t5x, t5x/examples/t5/network.py and layers.py
    "T5, T5X": Model(
        ["token_embedder/embedding"],
        [
            "encoder/relpos_bias/rel_embedding",
            "decoder/relpos_bias/rel_embedding",
            "encoder/layers_0/attention/query/kernel",
            "encoder/layers_0/pre_mlp_layer_norm/scale",
            "encoder/encoder_norm/scale",
            "decoder/logits_dense/kernel",
        ],
    ),
    # huggingface/transformers, models/clip/modeling_flax_clip.py
    "CLIP, Hugging Face": Model(
        [
            "vision_model/embeddings/class_embedding",
            "vision_model/embeddings/patch_embedding/kernel",
            "vision_model/embeddings/position_embedding/embedding",
            "text_model/embeddings/token_embedding/embedding",
            "text_model/embeddings/position_embedding/embedding",
        ],
        [
            *under("vision_model", CLIP_LAYER),
            *under("text_model", CLIP_LAYER),
            "vision_model/pre_layrnorm/scale",
            "vision_model/post_layernorm/scale",
            "text_model/final_layer_norm/bias",
            "visual_projection/kernel",
            "text_projection/kernel",
            "logit_scale",
        ],
    ),
    # google-research/scenic, scenic/projects/baselines/clip/layers.py, after openai/CLIP
    "CLIP, Scenic": Model(
        [
            "visual/conv1/kernel",
            "visual/class_embedding",
            "visual/positional_embedding",
            "text/token_embedding/embedding",
            "text/positional_embedding",
        ],
        [
            "visual/ln_pre/scale",
            "visual/transformer/resblocks.0/attn/query/kernel",
            "visual/transformer/resblocks.0/mlp/c_fc/kernel",
            "visual/ln_post/scale",
            "visual/proj/kernel",
            "text/transformer/resblocks_11/ln_1/scale",
            "text/ln_final/scale",
            "text/text_projection/kernel",
            "logit_scale",
        ],
    ),
    # the same file: CLIP's ResNets have a stem of three convolutions
    "CLIP ResNet, Scenic": Model(
        under("visual", ["conv1/kernel", "bn1/scale", "conv2/kernel", "conv3/kernel", "bn3/bias"]),
        [
            "visual/layer1/0/conv1/kernel",
            "visual/layer1/0/bn3/scale",
            "visual/layer4/2/downsample/0/kernel",
            "visual/attnpool/positional_embedding",
            "visual/attnpool/attn/query/kernel",
        ],
    ),
    # google-research/scenic, scenic/projects/baselines/centernet/modeling/convnext.py
    "ConvNeXt, Scenic": Model(
        [
            "downsample_layers.0.0/kernel",
            "downsample_layers.0.0/bias",
            "downsample_layers.0.1/scale",
        ],
        [
            "downsample_layers.1.0/scale",
            "downsample_layers.1.1/kernel",
            "stages.0.0/dwconv/kernel",
            "stages.2.8/gamma",
            "norm/scale",
            "output_projection/kernel",
        ],
    ),
    # DarshanDeshpande/jax-models, jax_models/models/convnext.py
    "ConvNeXt, jax-models": Model(
        ["downsample_layers00/kernel", "downsample_layers01/scale"],
        [
            "downsample_layers10/scale",
            "downsample_layers11/kernel",
            "stages00/dwconv/kernel",
            "stages01/pwconv1/kernel",
            "head/kernel",
        ],
    ),
    # google/flax, examples/imagenet/models.py
    "ResNet, Flax's example": Model(
        ["conv_init/kernel", "bn_init/scale", "bn_init/bias"],
        [
            "BottleneckResNetBlock_0/Conv_0/kernel",
            "BottleneckResNetBlock_0/conv_proj/kernel",
            "BottleneckResNetBlock_0/norm_proj/scale",
            "ResNetBlock_3/BatchNorm_1/bias",
            "Dense_0/kernel",
        ],
    ),
    # huggingface/transformers, models/resnet/modeling_flax_resnet.py
    "ResNet, Hugging Face": Model(
        under(
            "resnet/embedder/embedder",
            ["convolution/kernel", "normalization/scale", "normalization/bias"],
        ),
        [
            "resnet/encoder/stages/0/layers/0/layer/0/convolution/kernel",
            "resnet/encoder/stages/0/layers/0/shortcut/normalization/scale",
            "classifier/1/kernel",
        ],
    ),
    # google-research/big_vision, big_vision/models/bit.py
    "ResNet, big_vision": Model(
        ["conv_root/kernel", "gn_root/scale", "gn_root/bias"],
        [
            "block1/unit1/conv1/kernel",
            "block1/unit1/conv_proj/kernel",
            "block1/unit1/gn_proj/scale",
            "block4/unit3/gn3/bias",
            "head/kernel",
        ],
    ),
    # google-research/scenic, scenic/projects/baselines/resnet.py
    "ResNet, Scenic": Model(
        ["stem_conv/kernel", "init_bn/scale", "init_bn/bias"],
        [
            "ResidualBlock_0/proj_conv/kernel",
            "ResidualBlock_0/conv1/kernel",
            "ResidualBlock_0/bn1/scale",
            "output_projection/kernel",
        ],
    ),
    # AI-Hypercomputer/maxtext, MaxText/layers/models.py; its params keep the collection's name
    "MaxText": Model(
        ["params/token_embedder/embedding", "params/decoder/position_embedder/embedding"],
        [
            "params/decoder/layers/self_attention/query/kernel",
            "params/decoder/layers/mlp/wi_0/kernel",
            "params/decoder/decoder_norm/scale",
            "params/decoder/logits_dense/kernel",
        ],
    ),
    # google-deepmind/gemma, gemma/gm/nn/_modules.py and gemma/gm/nn/vision
    "Gemma": Model(
        [
            "embedder/input_embedding",
            "vision_encoder/siglip_encoder/embedding/kernel",
            "vision_encoder/siglip_encoder/pos_embedding",
        ],
        [
            "embedder/mm_input_projection/w",
            "embedder/mm_soft_embedding_norm/scale",
            "layer_0/attn/q_einsum/w",
            "layer_0/mlp/gating_einsum",
            "final_norm/scale",
        ],
    ),
}

NNX = {
    # pythoncrazy/jimm, src/jimm/common/vit.py
    "ViT, jimm": Model(
        [
            *under(
                "encoder",
                ["patch_embeddings/kernel", "patch_embeddings/bias", "position_embeddings"],
            ),
            "encoder/cls_token",
        ],
        [
            "encoder/ln_pre/scale",
            "encoder/encoder/blocks/layers/0/attn/query/kernel",
            "encoder/encoder/blocks/layers/0/mlp/layers/0/kernel",
            "encoder/MAPHead/probe",
            "encoder/ln_post/scale",
            "classifier/kernel",
        ],
    ),
    # jax-ml/bonsai, bonsai/models/vit/modeling.py
    "ViT, Bonsai": Model(
        under("pos_embeddings", ["projection/kernel", "cls_token", "pos_embeddings"]),
        [
            "layers/0/attention/query/kernel",
            "layers/0/layernorm_before/scale",
            "layers/11/linear2/kernel",
            "ln/scale",
            "classifier/kernel",
        ],
    ),
    # jax-ml/bonsai, bonsai/models/dinov3/modeling.py
    "DINOv3, Bonsai": Model(
        under(
            "embeddings", ["cls_token", "mask_token", "register_tokens", "patch_embeddings/kernel"]
        ),
        ["layer/0/attention/q_proj/kernel", "layer/0/layer_scale1/lambda1", "norm/scale"],
    ),
    # erfanzar/EasyDeL, easydel/modules/roberta/modeling_roberta.py
    "RoBERTa, EasyDeL": Model(under("roberta", BERT), under("roberta", BERT_LAYER)),
    # erfanzar/EasyDeL, easydel/modules/gpt2/modeling_gpt2.py
    "GPT-2, EasyDeL": Model(
        ["transformer/wte/embedding", "transformer/wpe/embedding"],
        [*under("transformer", GPT2_BLOCK), "lm_head/kernel"],
    ),
    # jax-ml/bonsai, bonsai/models/umt5/modeling.py
    "T5, Bonsai": Model(
        ["encoder/embed_tokens/embedding", "decoder/embed_tokens/embedding"],
        [
            "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding",
            "encoder/block/0/layer/0/SelfAttention/q/kernel",
            "decoder/final_layer_norm/weight",
            "lm_head/kernel",
        ],
    ),
    # pythoncrazy/jimm, src/jimm/models/clip/clip_model.py
    "CLIP, jimm": Model(
        [
            "vision_model/encoder/patch_embeddings/kernel",
            "vision_model/encoder/cls_token",
            "vision_model/encoder/position_embeddings",
            "text_model/token_embedding/embedding",
            "text_model/positional_embedding",
        ],
        [
            "vision_model/encoder/ln_pre/scale",
            "vision_model/visual_projection/kernel",
            "text_model/transformer/blocks/layers/0/attn/out/kernel",
            "text_model/ln_final/scale",
            "text_model/text_projection/kernel",
            "logit_scale",
        ],
    ),
    # jax-ml/bonsai, bonsai/models/convnext/modeling.py: each stage has downsample_layers of its own
    "ConvNeXt, Bonsai": Model(
        under("embedding_layer/layers", ["0/kernel", "0/bias", "1/scale", "1/bias"]),
        [
            "stages/1/downsample_layers/0/scale",
            "stages/1/downsample_layers/1/kernel",
            "stages/0/layers/0/dwconv/kernel",
            "stages/0/layers/0/gamma",
            "norm/scale",
            "head/kernel",
        ],
    ),
    # jax-ml/bonsai, bonsai/models/resnet/modeling.py
    "ResNet, Bonsai": Model(
        ["stem/conv/kernel", "stem/bn/scale", "stem/bn/bias"],
        [
            "layer0/blocks/0/conv0/kernel",
            "layer0/blocks/0/conv1/kernel",
            "layer0/blocks/0/bn1/scale",
            "layer0/blocks/0/downsample/conv/kernel",
            "fc/kernel",
        ],
    ),
    # jax-ml/bonsai, bonsai/models/gemma3/modeling.py
    "Gemma 3, Bonsai": Model(
        ["embed_tokens/weight/embedding", "vision_tower/embeddings/patch_embedding/kernel"],
        [
            "language_model/layers/0/self_attn/q_proj/kernel",
            "language_model/norm/scale",
            "multi_modal_projector/mm_soft_emb_norm/scale",
            "multi_modal_projector/mm_input_projection_weight",
        ],
    ),
}
MODELS = LINEN | {f"{name}, NNX": model for name, model in NNX.items()}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_embedding_layer_is_found_and_nothing_else(model: Model) -> None:
    found = [path for path in model.embedding + model.others if re.search(PATTERN, path)]
    assert found == model.embedding


@pytest.mark.parametrize("family", ["ViT", "BERT", "GPT-2", "T5", "CLIP", "ConvNeXt", "ResNet"])
def test_every_family_is_there_in_linen_and_in_nnx(family: str) -> None:
    for table in (LINEN, NNX):
        assert any(family in name for name in table), family


@pytest.mark.parametrize(
    "path",
    [
        "layers/0/attn/rotary_emb/inv_freq",
        "layers/0/rope_embeddings/position_embedding",
        "decoder/block_0/q_embed_proj/kernel",
        "decoder/block_0/patch_embed_proj/kernel",
        "block/reembedding/kernel",
        "head/embedding",
        "block_0/embed",
        "layer_0/conv1/kernel",
        "backbone/block/bn1/scale",
        "query_embeddings_norm/scale",
        "decoder/lm_head/kernel",
        "shared_mlp/kernel",
        "system/kernel",
        "class_head/kernel",
    ],
)
def test_names_that_only_look_alike_are_left_alone(path: str) -> None:
    assert not re.search(PATTERN, path)


def test_one_pattern_serves_every_model_in_path_mask() -> None:
    # path_mask wants each of its patterns to match: a tuple with one per family would raise.
    model = LINEN["GPT-2, Hugging Face"]
    tree = {path: jnp.zeros(1) for path in model.embedding + model.others}
    mask = optax_spd.path_mask(*optax_spd.DEFAULT_EMBEDDING_PATTERNS)(tree)
    assert [path for path, frozen in mask.items() if frozen] == sorted(model.embedding)
    with pytest.raises(ValueError, match="matches no parameter path"):
        optax_spd.path_mask(*optax_spd.DEFAULT_EMBEDDING_PATTERNS)({"dense": jnp.zeros(1)})


# Modules of Flax: its own naming, boxes and lists ------------------------------------------------


class Embeddings(nn.Module):
    def setup(self) -> None:
        init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        self.word_embeddings = nn.Embed(8, 4, embedding_init=init)
        self.LayerNorm = nn.LayerNorm()

    def __call__(self, tokens: Any) -> Any:
        return self.LayerNorm(self.word_embeddings(tokens))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any, image: Any) -> Any:
        x = Embeddings(name="embeddings")(tokens) + nn.Embed(8, 4)(tokens)
        patches = nn.Conv(4, (2, 2), (2, 2), name="embedding")(image).reshape(1, -1, 4)
        x = jnp.concatenate([self.param("cls", nn.initializers.zeros, (1, 1, 4)), patches, x], 1)
        x = nn.MultiHeadDotProductAttention(1, name="attention")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


def test_a_linen_module() -> None:
    shapes = jax.eval_shape(
        Encoder().init, jax.random.key(0), jnp.zeros((1, 3), int), jnp.zeros((1, 4, 4, 3))
    )["params"]
    mask = optax_spd.path_mask(PATTERN)(shapes)
    expected = {"cls", "embedding", "embeddings", "Embed_0"}
    assert {name for name in mask if all(jax.tree.leaves(mask[name]))} == expected
    assert {name for name in mask if any(jax.tree.leaves(mask[name]))} == expected
    assert "attention" in mask


class GPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(8, 4, rngs=rngs)
        self.pos_embedding = nnx.Param(jnp.zeros((3, 4)))
        self.h = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.lm_head = nnx.Linear(4, 8, rngs=rngs)


def test_an_nnx_module() -> None:
    params = nnx.state(nnx.eval_shape(lambda: GPT(nnx.Rngs(0))), nnx.Param)
    names = optax_spd.layer_names(params)
    masked = optax_spd.layer_names(params, mask=optax_spd.path_mask(PATTERN))
    assert masked == ["pos_embedding", "wte/embedding"]
    assert "h/1/kernel" in names

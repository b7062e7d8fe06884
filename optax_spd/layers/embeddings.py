r"""Finds a model's embedding layer by the parameter paths of common models.

The embedding layer computes the first hidden state from the input. It has token, patch, position
and type embeddings, class and register tokens, and their normalisation in the same module. In a
convolutional network it is the stem: the first convolution and its normalisation. The names come
from the models' code; the tests list the paths and their sources.
"""

# Paths that are never the model's input: tables of relative positions and rotary frequencies in
# attention layers, and the positions in the attention pooling of CLIP's ResNets.
_ELSEWHERE = r"relative|relpos|rotary|rope_|attnpool"

# Each is matched from the beginning of a key in the path.
_ALTERNATIVES = (
    # Hugging Face's BERT, RoBERTa, ViT, CLIP: one module with all embeddings and their LayerNorm.
    # ELECTRA has a separate projection to the hidden size.
    r"embeddings(_project)?/",
    # Most other models have one module or array per embedding: pos_embedding (big_vision),
    # word_embeddings (BERT without the module), patch_embeddings (jimm), positional_embedding
    # (OpenAI's CLIP), token_embedder and position_embedder (T5X, MaxText), token_emb (tutorials),
    # input_embedding and per_layer_input_embedding (Gemma).
    r"(token|tok|word|text|pos|position|positional|patch|cls|class|type|token_type|segment)"
    r"_emb(ed|eds|edding|eddings|edder)?(/|$)",
    r"(per_layer_)?input_embedding$",
    # Hugging Face's Llama, Gemma, Qwen, Whisper.
    r"embed_(tokens|positions)(/|$)",
    # A module with a plain name: the patch convolution of Google's ViTs, a user's Embed, linen's
    # automatic Embed_0. The key "embedding" alone does not suffice: every Embed's table has it.
    r"(embed|embedding|embedder|Embed_\d+)/(embedding|kernel|bias)$",
    # An Embed named after what it looks up.
    r"(token|word|position|token_type)/embedding$",
    # GPT-2, GPT-J, Llama in EasyLM.
    r"(wte|wpe)(/|$)",
    # T5: one table for the encoder and the decoder.
    r"shared/embedding$",
    # Token arrays. BERT's head for masked words is called cls too, but is a module.
    r"(cls|(cls|class|mask|dist|reg|register)_tokens?)$",
    # Stems of convolutional networks: Bonsai; Scenic; Flax's examples; big_vision; Hugging Face;
    # Bonsai's ConvNeXt and the tutorials' GPT; ConvNeXt with its authors' numbering, where the
    # first "downsampling" is the stem.
    r"stem(_conv|_bn|_norm)?/",
    r"init_bn/",
    r"(conv|bn|norm)_init/",
    r"(conv|gn)_root/",
    r"embedder/embedder/",
    r"embedding_layer/",
    r"downsample_layers[./]?0[./]?(layers/)?[01]/",
    # OpenAI's CLIP: the patch convolution of the ViT, the three of the ResNet's stem.
    r"visual/(conv|bn)[123]/",
)

# Blocks also have layers with these names, so they match at the top only: torchvision's ResNets,
# bare arrays.
_AT_THE_TOP = r"(params/)?((conv|bn)1/|(embed|embedding|embeddings)$)"

DEFAULT_EMBEDDING_PATTERNS: tuple[str, ...] = (
    rf"^(?!.*({_ELSEWHERE}))({_AT_THE_TOP}|(.*/)?({'|'.join(_ALTERNATIVES)}))",
)
"""One regular expression that finds the embedding layer of most Flax models, linen and NNX.

It is a single pattern for all model families, because :func:`optax_spd.path_mask` requires every
pattern to match something. It covers ViT, BERT, GPT-2, T5, CLIP, ConvNeXt, ResNet and similar
models in Hugging Face, google-research (vision_transformer, big_vision, Scenic, T5X), Gemma,
MaxText, jimm and Bonsai. To see what it finds:
``optax_spd.path_mask(*DEFAULT_EMBEDDING_PATTERNS)(params)``.
"""

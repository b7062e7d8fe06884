r"""Which arrays are a model's embedding layer, by the paths that common models give them.

The embedding layer is what makes the first hidden state of the input: token, patch, position and
type embeddings, class and register tokens, what normalises them inside the same module; in a
convolutional network its stem, the first convolution and its normalisation. Names were read from
the models' code; the tests list the paths and where they come from.
"""

# Where none of the names below means the model's input: tables of relative positions and rotary
# frequencies in attention layers, the positions in the attention pooling of CLIP's ResNets.
_ELSEWHERE = r"relative|relpos|rotary|rope_|attnpool"

# Each is matched against whole keys of the path, from the beginning of one.
_ALTERNATIVES = (
    # Hugging Face's BERT, RoBERTa, ViT, CLIP: one module for all of them, with its LayerNorm;
    # ELECTRA widens it to the hidden size outside.
    r"embeddings(_project)?/",
    # One module or array each, in most others: pos_embedding (big_vision), word_embeddings (BERT
    # without the module), patch_embeddings (jimm), positional_embedding (OpenAI's CLIP),
    # token_embedder and position_embedder (T5X, MaxText), token_emb (tutorials), input_embedding
    # and per_layer_input_embedding (Gemma).
    r"(token|tok|word|text|pos|position|positional|patch|cls|class|type|token_type|segment)"
    r"_emb(ed|eds|edding|eddings|edder)?(/|$)",
    r"(per_layer_)?input_embedding$",
    # Llama, Gemma, Qwen, Whisper as Hugging Face names them.
    r"embed_(tokens|positions)(/|$)",
    # A module of that plain name: the patch convolution of Google's ViTs, an Embed of one's own,
    # Embed_0 where linen names it. A lone "embedding" is the table of any Embed, whatever it does.
    r"(embed|embedding|embedder|Embed_\d+)/(embedding|kernel|bias)$",
    # An Embed that is named by what it looks up.
    r"(token|word|position|token_type)/embedding$",
    # GPT-2, GPT-J, Llama in EasyLM.
    r"(wte|wpe)(/|$)",
    # T5: one table for the encoder and the decoder.
    r"shared/embedding$",
    # Tokens that are arrays. BERT's head for masked words is called cls too, but is a module.
    r"(cls|(cls|class|mask|dist|reg|register)_tokens?)$",
    # Stems of convolutional networks: Bonsai; Scenic; Flax's examples; big_vision; Hugging Face;
    # Bonsai's ConvNeXt and the tutorials' GPT; ConvNeXt in its authors' numbering, where the first
    # "downsampling" is the stem.
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

# Blocks have layers of that name as well, so only at the top: torchvision's ResNets, bare arrays.
_AT_THE_TOP = r"(params/)?((conv|bn)1/|(embed|embedding|embeddings)$)"

DEFAULT_EMBEDDING_PATTERNS: tuple[str, ...] = (
    rf"^(?!.*({_ELSEWHERE}))({_AT_THE_TOP}|(.*/)?({'|'.join(_ALTERNATIVES)}))",
)
"""One regular expression that finds the embedding layer of most Flax models, linen and NNX.

For :func:`optax_spd.path_mask`, which wants every pattern to match something; hence one and not
one per family. It knows the names of ViT, BERT, GPT-2, T5, CLIP, ConvNeXt, ResNet and their like
in Hugging Face, google-research (vision_transformer, big_vision, Scenic, T5X), Gemma, MaxText, jimm
and Bonsai. Look at what it found: ``optax_spd.path_mask(*DEFAULT_EMBEDDING_PATTERNS)(params)``.
"""

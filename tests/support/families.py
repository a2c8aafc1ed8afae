"""Small random configurations of transformers' models, by family."""

import importlib

WIDTH = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**WIDTH, "vocab_size": 700}
IMAGE = {**WIDTH, "image_size": 64}
SEQUENCE = {
    "d_model": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 200,
    "decoder_ffn_dim": 200,
    "vocab_size": 700,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# looked at while describe was written: after them candidates were added (T5's queries, sinusoids, equal rows), and the choice
# among schemes that fit (initperf/init/identify/choose_scheme.py) got its shares and stacks
SEEN = {
    "Bert": ("Model", TEXT),
    "Roberta": ("Model", TEXT),
    "DistilBert": ("Model", {"dim": 96, "n_layers": 2, "n_heads": 4, "hidden_dim": 200, "vocab_size": 700}),
    "GPT2": ("LMHeadModel", {"n_embd": 96, "n_layer": 3, "n_head": 4, "vocab_size": 700, **SPECIAL}),
    "Llama": ("Model", TEXT),
    "ViT": ("Model", IMAGE),
    "ResNet": ("Model", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]}),
    "T5": ("Model", {"d_model": 96, "d_kv": 24, "d_ff": 200, "num_layers": 2, "num_heads": 4, "vocab_size": 700}),
    "Whisper": ("Model", {**SEQUENCE, **SPECIAL, "max_source_positions": 100, "max_target_positions": 50}),
    "CLIP": ("Model", {"text_config": {**TEXT, **SPECIAL}, "vision_config": {**IMAGE, "patch_size": 16}}),
    "Bart": ("Model", SEQUENCE),
    "Mixtral": ("Model", {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4}),
    "Mamba": ("Model", {"hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 700, "state_size": 8}),
    "Swin": ("Model", {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "image_size": 64}),
    "ConvNext": ("Model", {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}),
}
# run for the first time when candidates, limits and that choice were written; what came later is the explanation by training, for
# models that hold trained tensors, which changed none of their counts
UNSEEN = {
    "Pegasus": ("Model", SEQUENCE),
    "MPNet": ("Model", TEXT),
    "Phi": ("Model", TEXT),
    "Falcon": ("Model", TEXT),
    "Mistral": ("Model", {**TEXT, "num_key_value_heads": 2}),
    "GPTNeo": (
        "Model",
        {"hidden_size": 96, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]], "vocab_size": 700},
    ),
    "Blenderbot": ("Model", SEQUENCE),
    "M2M100": ("Model", SEQUENCE),
    "Segformer": (
        "Model",
        {
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "num_attention_heads": [1, 2],
            "sr_ratios": [4, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [4, 4],
        },
    ),
    "RegNet": ("Model", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "groups_width": 16}),
    "Yolos": ("Model", {**IMAGE, "image_size": [64, 64], "num_detection_tokens": 12}),
    "Olmo": ("Model", TEXT),
    "Siglip": ("Model", {"text_config": {**TEXT, **SPECIAL}, "vision_config": {**IMAGE, "patch_size": 16}}),
    "Hubert": (
        "Model",
        {**WIDTH, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16},
    ),
    "Xglm": (
        "Model",
        {"d_model": 96, "ffn_dim": 200, "num_layers": 2, "attention_heads": 4, "vocab_size": 700},
    ),
}


def build(family):
    """A freshly made model of the family."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    kind, arguments = (SEEN | UNSEEN)[family]
    prefix = {"Xglm": "XGLM"}.get(family, family)
    return getattr(transformers, prefix + kind)(getattr(transformers, f"{prefix}Config")(**arguments))

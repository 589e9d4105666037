"""Tiny networks of the architectures of `transformers`, with random numbers and without downloads.

A configuration of an architecture is its default one with small sizes in it. The sizes have many
names; `SIZES` has the usual ones, and `SPECIAL` what single architectures want besides.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

NAMES = """
gpt2 gpt_neo gpt_neox gptj opt bloom llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma
gemma2 gemma3_text phi phi3 falcon mpt stablelm starcoder2 cohere olmo olmo2 granite granitemoe
persimmon codegen ctrl xglm biogpt openai-gpt glm glm4 exaone4 smollm3 helium arcee deepseek_v3
mamba mamba2 rwkv olmoe phimoe ernie4_5 hunyuan_v1_dense lfm2 bitnet diffllama seed_oss apertus
cohere2 bert roberta distilbert albert electra camembert xlm-roberta xlm deberta deberta-v2
mpnet mobilebert squeezebert layoutlm convbert nystromformer yoso roformer ernie megatron-bert
rembert fnet big_bird longformer ibert data2vec-text roberta-prelayernorm splinter mra
modernbert canine flaubert t5 mt5 bart mbart pegasus marian blenderbot blenderbot-small m2m_100
led longt5 umt5 switch_transformers fsmt plbart prophetnet nllb-moe bigbird_pegasus mvp vit deit
beit convnext convnextv2 resnet regnet swin swinv2 poolformer segformer pvt pvt_v2 levit
mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 efficientnet bit focalnet dinov2
dinov2_with_registers vit_msn hiera ijepa data2vec-vision swiftformer hgnet_v2 donut-swin
wav2vec2 hubert wavlm unispeech sew whisper audio-spectrogram-transformer speech_to_text
data2vec-audio
""".split()  # noqa: SIM905
WIDTH, HEADS, DEPTH, INNER, WORDS, LENGTH, PIXELS = 32, 4, 2, 48, 64, 7, 32
LAYERS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers"),
}
INSIDE = {
    *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "hidden_dim", "dff"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "d_inner"),
}
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim"], WIDTH),
    **dict.fromkeys(["embedding_size", "word_embed_proj_dim", "rnn_hidden"], WIDTH),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], DEPTH),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_decoder_layers"], DEPTH),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], HEADS),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], HEADS),
    "num_experts_per_tok": 2,
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_head_kv"], HEADS // 2),
    **dict.fromkeys(
        ["hidden_dim", "intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"], INNER
    ),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size"], INNER),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], INNER // 2),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 40),
    **dict.fromkeys(["max_source_positions", "max_target_positions"], 40),
    **dict.fromkeys(["head_dim", "d_kv", "attention_head_size", "d_head"], WIDTH // HEADS),
    "vocab_size": WORDS,
    "image_size": PIXELS,
    "patch_size": 8,
    "num_labels": 5,
    "type_vocab_size": 2,
    "sliding_window": 16,
    "layer_types": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4}
SPEECH = {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
# fmt: off
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "ctrl": {"dff": INNER},
    "xglm": {"attention_heads": HEADS},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "distilbert": {"hidden_dim": INNER},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": HEADS,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "falcon": {"new_decoder_architecture": False},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": WIDTH, "context_length": 40},
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "recurrent_gemma": {"lru_width": WIDTH, "num_hidden_layers": 3},
    "olmoe": {"num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "xlm": {"n_langs": 1},
    "mobilebert": {"true_hidden_size": WIDTH, "intra_bottleneck_size": WIDTH},
    "albert": {"embedding_size": 16},
    "squeezebert": dict.fromkeys(
        [
            "q_groups",
            "k_groups",
            "v_groups",
            "post_attention_groups",
            "intermediate_groups",
            "output_groups",
        ],
        2,
    ),
    "longformer": {"attention_window": 4},
    "led": {
        "attention_window": 4,
        "max_encoder_position_embeddings": 40,
        "max_decoder_position_embeddings": 40,
    },
    "yoso": {"use_expectation": True},
    "canine": {
        "num_hash_buckets": 64,
        "upsampling_kernel_size": 4,
        "downsampling_rate": 4,
        "local_transformer_stride": 8,
    },
    "modernbert": {"local_attention": 8},
    "fsmt": {"src_vocab_size": WORDS, "tgt_vocab_size": WORDS, "langs": ["en", "de"]},
    "prophetnet": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 100},
    "convnext": STAGES,
    "convnextv2": STAGES,
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]},
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8},
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "num_groups": 4},
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "focalnet": {
        "embed_dim": 16,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "poolformer": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
    },
    "segformer": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
    },
    "pvt": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "sequence_reduction_ratios": [2, 1],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
    },
    "pvt_v2": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
    },
    "cvt": {"embed_dim": [16, 24, 32], "depth": [1, 1, 2], "num_heads": [1, 2, 4]},
    "levit": {
        "patch_size": 16,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [1, 2, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "image_size": 64,
    },
    "mobilenet_v1": {"depth_multiplier": 0.125},
    "mobilenet_v2": {"depth_multiplier": 0.25, "finegrained_output": False},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 64],
        "patch_size": 2,
        "image_size": 64,
    },
    "mobilevitv2": {"width_multiplier": 0.25, "patch_size": 2, "image_size": 64},
    "efficientnet": {
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "kernel_sizes": [3, 5],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 4],
        "depthwise_padding": [],
        "hidden_dim": 1280,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    },
    "hiera": {
        "embed_dim": 16,
        "image_size": [32, 32],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3],
        "query_stride": [2, 2],
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False],
        "num_query_pool": 1,
    },
    "swiftformer": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "image_size": 64},
    "hgnet_v2": {
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "embedding_size": 16,
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16],
        "stage_mid_channels": [8, 16],
        "stage_out_channels": [16, 32],
        "stage_num_blocks": [1, 1],
        "stage_numb_of_layers": [2, 2],
        "stage_downsample": [False, True],
        "stage_light_block": [False, True],
        "stage_kernel_size": [3, 5],
    },
    **dict.fromkeys(["wav2vec2", "hubert", "wavlm", "unispeech", "data2vec-audio"], SPEECH),
    "sew": {**SPEECH, "squeeze_factor": 2},
    "whisper": {"num_mel_bins": 80, "max_source_positions": 20},
    "audio-spectrogram-transformer": {
        "max_length": 40,
        "num_mel_bins": 32,
        "patch_size": 8,
        "frequency_stride": 8,
        "time_stride": 8,
    },
    "speech_to_text": {
        "max_source_positions": 400,
        "conv_channels": 32,
        "input_feat_per_channel": 80,
    },
}# fmt: on
CLASSES = [
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ",
]  # fmt: skip


def configuration(name: str, deeper: int = 0, wider: int = 1) -> Any:
    """Return a small configuration of an architecture, with more layers or wider inner layers."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    usual = kind()
    kinds = getattr(usual, "layer_types", None)
    by_layer = isinstance(kinds, list) and len(kinds) == getattr(usual, "num_hidden_layers", 0)
    set_by_class = [] if by_layer else ["layer_types"]
    set_by_class += [k for k in SIZES if isinstance(getattr(kind, k, None), property)]
    sizes = {k: v for k, v in SIZES.items() if getattr(usual, k, None) is not None}
    special = SPECIAL.get(name, {})
    set_by_class += [k for k in SIZES if usual.attribute_map.get(k) in special]
    sizes = {k: v for k, v in sizes.items() if k not in set_by_class} | special
    for key, value in sizes.items():
        if key in LAYERS and value == DEPTH:
            sizes[key] = DEPTH + deeper
        elif key == "depths" and deeper:
            sizes[key] = [*value[:-1], value[-1] + deeper]
        elif key == "attention_types" and deeper:
            sizes[key] = [*value, [value[-1][0][:1], deeper]]
        elif key in INSIDE:
            sizes[key] = value * wider
    return kind(**sizes)


def build(name: str, seed: int = 0, deeper: int = 0, wider: int = 1) -> nn.Module:
    """Return a small network of an architecture, with its most usual head."""
    from transformers.models.auto import modeling_auto

    config = configuration(name, deeper, wider)
    for task in CLASSES:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
        if type(config) in mapping:
            break
    else:
        mapping = modeling_auto.MODEL_MAPPING
    kind = mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    torch.manual_seed(seed)
    return kind(config).eval()


def inputs(net: nn.Module, count: int = 2) -> dict[str, Tensor]:
    """Return random inputs for a network, by name."""
    arguments = inspect.signature(net.forward).parameters
    ids = torch.randint(3, WORDS, (count, LENGTH))
    if "input_ids" in arguments:
        mask = torch.ones(count, LENGTH, dtype=torch.long)
        mask[-1, -2:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(0, 1)}
        return {k: v for k, v in batch.items() if k in arguments}
    if "pixel_values" in arguments:
        config = net.config
        size = getattr(config, "image_size", PIXELS)
        height, width = (size, size) if isinstance(size, int) else size
        return {
            "pixel_values": torch.randn(count, getattr(config, "num_channels", 3), height, width)
        }
    kind = net.config.model_type
    if "input_features" in arguments:
        shape = (40, 80) if kind == "speech_to_text" else (80, 40)
        words = {"decoder_input_ids": ids} if "decoder_input_ids" in arguments else {}
        return {"input_features": torch.randn(count, *shape), **words}
    shape = (40, 32) if kind == "audio-spectrogram-transformer" else (600,)
    return {"input_values": torch.randn(count, *shape)}

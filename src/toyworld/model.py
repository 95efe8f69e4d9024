"""The embedded model: a model of Qwen3-VL's architecture with about 3 M parameters.

It has patches of 16 px and a 2 x 2 merge, as the original, so a visual token covers 32 px. Patches of 8 px were 2.3
times slower per image on a CPU, and not better in the same time (benchmarks/NOTES.md).
"""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from coordexp.models.attention import use_segment_attention
from coordexp.models.expand import round_up
from coordexp.text.vocabulary import token_id


def tiny_config(tokenizer: PreTrainedTokenizerBase, hidden: int = 128, text_layers: int = 6) -> Qwen3VLConfig:
    """A configuration with the special token ids and vocabulary size of the tokenizer."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": round_up(len(tokenizer)),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": text_layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            # 12 + 10 + 10 = head_dim / 2 frequencies for time, height and width
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": token_id(tokenizer, "<|im_end|>"),
            "pad_token_id": token_id(tokenizer, "<|endoftext|>"),
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 1024,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_tiny(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3VLForConditionalGeneration:
    """A randomly initialized tiny model in float32."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(tiny_config(tokenizer))
    model.generation_config.eos_token_id = token_id(tokenizer, "<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return use_segment_attention(model)

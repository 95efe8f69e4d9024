"""The embedded model's tokenizer: byte-level BPE with Qwen's special tokens and a merged JSON scaffold.

A 3 M-parameter model cannot afford Qwen's vocabulary of 151,669 entries. This tokenizer has the same special tokens in
the same order, the same chat markers, single digits, and one token per scaffold piece of the codecs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from coordexp.text.codecs import CODECS, END_OF_TURN, Role, TextObject
from coordexp.text.prompts import FORMAT_SUFFIXES, TASKS, WORDINGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Qwen3's added tokens up to <|video_pad|>, in Qwen's order (its ids 151643..151656).
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
MOST_TOKENS = 4096
# Single digits, letters with an optional leading space, runs of anything else: a shortened version of Qwen2's rule.
SPLIT_PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


def scaffold_pieces() -> list[str]:
    """Every piece of scaffold text that the codecs emit around two objects, longest first, without special tokens."""
    pair = [TextObject("a", (1, 2, 3, 4))] * 2
    pieces = {
        segment.text
        for codec in CODECS.values()
        for objects in ([], pair)
        for segment in codec.segments(objects)
        if segment.role in (Role.STRUCT, Role.CLOSE) and "<|" not in segment.text
    }
    return sorted(pieces, key=lambda piece: (-len(piece), piece))


def build_tiny_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer until each word, and each word of the prompts, is one token with and without leading space.

    Both forms occur: the first word of a category name has no space, because the scaffold before it ends in a quote.
    Deterministic for the same `words`.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import, and only needed here

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS,  # never reached: training ends when nothing is left to merge
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    questions = [*TASKS.values(), *FORMAT_SUFFIXES.values(), *(wordings[0] for wordings in WORDINGS.values())]
    corpus = [*words, *(f" {word}" for word in words), *questions, "user\n", "assistant\n"]
    core.train_from_iterator(corpus * 4, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    core.add_tokens([AddedToken(piece, normalized=False) for piece in scaffold_pieces()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )

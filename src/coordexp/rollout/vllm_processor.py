"""A logits processor, loaded by vLLM, for the constraints that a server's grammar cannot express.

It runs in the server's process and environment, and reads the constraints from the extra arguments of each request.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from coordexp.config.schema import DecodeParams
from coordexp.text.grammar import AnswerGrammar
from coordexp.text.grammar_walk import AnswerWalk

CONSTRAINTS_KEY = "coordexp_constraints"  # repeated from vllm_engine.py, whose imports a server may lack


class AnswerProcessor(AdapterLogitsProcessor):
    """Masks the logits of each constrained request by its grammar; other requests pass unchanged."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._tokenizer = AutoTokenizer.from_pretrained(vllm_config.model_config.model, local_files_only=True)
        self._grammars: dict[str, AnswerGrammar] = {}

    def is_argmax_invariant(self) -> bool:
        """False: the masks change greedy answers too."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
        """The masking function of one request."""
        text = (params.extra_args or {}).get(CONSTRAINTS_KEY)
        if text is None:
            return None
        if text not in self._grammars:
            asked = json.loads(text)
            decode = DecodeParams.model_validate(asked["decode"])
            self._grammars[text] = AnswerGrammar(self._tokenizer, asked["codec"], decode, asked["names"])
        walk = AnswerWalk(self._grammars[text])
        taken = 0

        def mask(output_ids: list[int], logits: Tensor) -> Tensor:
            nonlocal taken
            for token_id in output_ids[taken:]:
                walk.advance(token_id)
            taken = len(output_ids)
            allowed = torch.from_numpy(walk.allowed()).to(logits.device)
            masked = torch.full_like(logits, -torch.inf)
            n_tokens = len(allowed)  # the embedding may have more rows than the tokenizer has tokens
            masked[:n_tokens] = logits[:n_tokens].masked_fill(~allowed, -torch.inf)
            return masked

        return mask

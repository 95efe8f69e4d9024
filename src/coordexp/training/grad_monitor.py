"""How hard each term of the objective pulls, and whether it pulls with the text loss or against it.

Of a step that is split over several forwards or processes, the log holds what the first forward of the main one found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

TEXT = "text_ce"


def monitored_parameters(model: nn.Module, every: int, step: int) -> list[nn.Parameter]:
    """The trainable parameters in every `every`-th step, none in the others; 0 is never."""
    due = every > 0 and step % every == 0
    return [p for p in model.parameters() if p.requires_grad] if due else []


def gradient_logs(weighted: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """`grad/<term>_norm` of each weighted term and `grad/<term>_cos_text`, its cosine with the gradient of text_ce.

    The graph is kept for the backward pass of the step; nothing is accumulated into `.grad`, no random number is drawn.
    A cosine with a zero gradient is undefined and left out. One term is differentiated at a time, so that no more than
    two gradients are held.
    """
    text = list(_gradient(weighted[TEXT], parameters)) if TEXT in weighted else []
    text_norm = _norm(text)
    logs: dict[str, float] = {}
    for name, value in weighted.items():
        gradient = text if name == TEXT and text else list(_gradient(value, parameters))
        norm = _norm(gradient)
        logs[f"grad/{name}_norm"] = norm
        if name != TEXT and norm * text_norm > 0:
            product = sum(float((a * b).sum()) for a, b in zip(gradient, text, strict=True))
            logs[f"grad/{name}_cos_text"] = product / (norm * text_norm)
    return logs


def _gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    found = torch.autograd.grad(value, list(parameters), retain_graph=True, allow_unused=True)
    for gradient, parameter in zip(found, parameters, strict=True):
        yield torch.zeros_like(parameter) if gradient is None else gradient.detach()


def _norm(gradient: Sequence[Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in gradient) ** 0.5

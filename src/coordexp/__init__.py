"""A pretrained vision-language model as an open-vocabulary object detector, and the tools to evaluate it.

    from coordexp import Detector

`import coordexp` is fast: heavy libraries are loaded on the first use of `Detector` or `Detections`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordexp.detections import Detections
    from coordexp.detector import Detector

from coordexp.infra.threads import bound_spinning, let_segments_grow

bound_spinning()  # before anything imports torch
let_segments_grow()

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"coordexp.{name.lower()}"), name)

"""Position ids of a packed row: what keeps the segments of a pack apart.

transformers 5 separates packed segments only if `position_ids` has four rows and no attention mask is given: row 0
holds text positions that restart at 0 per segment, rows 1-3 the temporal, height and width positions of Qwen3-VL's
M-RoPE. Anything else leaks silently between segments, so a test compares packed with separate forwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def segment_positions(before_image: int, grid_height: int, grid_width: int, after_image: int) -> NDArray[np.int64]:
    """Positions (4, L) of one segment: text, one image of grid_height x grid_width visual tokens, text.

    Same rule as `Qwen3VLModel.get_rope_index`: image tokens share one temporal position, rows and columns count from
    it, and the text after the image goes on from the largest position plus one.
    """
    n_image = grid_height * grid_width
    length = before_image + n_image + after_image
    out = np.empty((4, length), dtype=np.int64)
    out[0] = np.arange(length)
    out[1:, :before_image] = np.arange(before_image)
    image = slice(before_image, before_image + n_image)
    out[1, image] = before_image
    out[2, image] = before_image + np.repeat(np.arange(grid_height), grid_width)
    out[3, image] = before_image + np.tile(np.arange(grid_width), grid_height)
    out[1:, image.stop :] = before_image + max(grid_height, grid_width) + np.arange(after_image)
    return out

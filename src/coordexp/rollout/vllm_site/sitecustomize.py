"""Start-up hook of the vLLM server's interpreter; Python imports it because its folder is on PYTHONPATH.

torchvision's wheels register two CUDA operators in a library that does not load with a CPU build of torch, so that the
import fails. Declaring the operators first lets it succeed; they are never called. Only the server process does this.
"""

import torch

if not torch.cuda.is_available():
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

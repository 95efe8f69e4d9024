"""Start-up hook of the vLLM server's interpreter; Python imports it because its folder is on PYTHONPATH.

torchvision's wheels register two CUDA operators in a library that does not load beside a CPU build of torch, and then
fail to import. Declaring the operators beforehand lets it load; nothing here calls them. Only this process does it.
"""

import torch

if not torch.cuda.is_available():
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

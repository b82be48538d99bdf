"""torchvision's compiled operators, declared where its build has none for this torch.

The package index may hold a torchvision that was built for CUDA only. Beside a CPU build of torch its import then fails
("operator torchvision::nms does not exist"), and timm and onnx2torch, which import it, fail with it. `declare` defines
what the import looks for; torchvision's own functions still refuse to run without their library.
"""

import importlib
import importlib.util
import sys

import torch

_LIBRARY = None


def declare():
    """Define torchvision::nms and torchvision::qnms if torchvision is installed and cannot define them itself."""
    global _LIBRARY
    if _LIBRARY is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported: the next import starts anew
        _LIBRARY = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

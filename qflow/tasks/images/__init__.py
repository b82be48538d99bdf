"""Ready tasks: models of timm, torchvision and transformers, ONNX files and the user's own, on images or arrays.

samples.py, arrays.py    the map-style data: files are opened when they are read
hub.py                   what fails in loading a library's model, in one line
timm_models.py, torchvision_models.py, transformers_models.py, own_models.py, onnx_data.py    one a task
"""

__all__ = [
    "arrays",
    "hub",
    "onnx_data",
    "own_models",
    "samples",
    "timm_models",
    "torchvision_models",
    "transformers_models",
]

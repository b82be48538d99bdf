"""Detection: pictures with COCO annotations, adapters from a model's outputs to boxes, and mAP by pycocotools."""

__all__ = ["adapters", "boxes", "data", "example", "example_training", "metric", "torchvision"]

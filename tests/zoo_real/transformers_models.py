"""Models of transformers from a configuration alone: text, segmentation, detection, a self-supervised backbone."""

import torch
from zoo_real.registry import Entry

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def pixels(size):
    return lambda batch: {"pixel_values": torch.randn(batch, 3, size, size)}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=64, intermediate_size=64, max_position_embeddings=16, num_labels=3, **SMALL)

    def text(batch):
        mask = torch.ones(batch, 12, dtype=torch.long)
        mask[0, 8:] = 0
        return {"input_ids": torch.randint(0, 64, (batch, 12)), "attention_mask": mask}

    return BertForSequenceClassification(config), text


def segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config), pixels(32)


def backbone(levels):
    from transformers import ResNetConfig

    stages = [f"stage{i}" for i in range(2, 2 + levels)]
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic", out_features=stages
    )


HEADS = {
    "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 6, "num_labels": 3, "d_model": 32,
}  # fmt: skip


def detr():
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(backbone_config=backbone(1), use_timm_backbone=False, **HEADS)
    return DetrForObjectDetection(config), pixels(64)


def deformable_detr():
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(
        backbone_config=backbone(2), use_timm_backbone=False, num_feature_levels=2, with_box_refine=True,
        encoder_n_points=2, decoder_n_points=2, disable_custom_kernels=True, **HEADS,
    )  # fmt: skip
    return DeformableDetrForObjectDetection(config), pixels(64)


def dinov2():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(image_size=32, patch_size=8, mlp_ratio=2, num_labels=4, **SMALL)
    return Dinov2ForImageClassification(config), pixels(32)


def entry(build, sample=True):
    return Entry(f"transformers_{build.__name__}", build, ("transformers",), sample)


ENTRIES = (
    entry(bert),
    entry(segformer),
    entry(detr, sample=False),
    entry(deformable_detr),
    entry(dinov2, sample=False),
)

"""Image backbones of timm: attention, windows, depthwise convolutions, reparameterized branches."""

from zoo_real.registry import Entry, images


def timm(name, size, **arguments):
    """Build the named network with 8 classes, for square images of `size`."""

    def build():
        from timm import create_model

        return create_model(name, pretrained=False, num_classes=8, **arguments), images(size, size)

    return build


def entry(name, size, architecture, sample=True, **arguments):
    return Entry(f"timm_{name}", timm(architecture, size, **arguments), ("timm", "torchvision"), sample)


ENTRIES = (
    entry("vit", 32, "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    entry(
        "swin", 32, "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2),
        num_heads=(2, 4), sample=False,
    ),
    entry("convnext", 32, "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    entry("efficientnet", 64, "efficientnet_b0", sample=False),
    entry("mobilenetv3", 64, "mobilenetv3_small_050"),
    entry(
        "fastvit", 64, "fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128),
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"), sample=False,
    ),
    entry("efficientformerv2", 64, "efficientformerv2_s0", sample=False, img_size=64),
    entry("mobilevit", 64, "mobilevit_xxs", sample=False),
)  # fmt: skip

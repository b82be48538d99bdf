"""The layers and blocks of a network that reconstruction compares with float, found in the traced graph."""

from support.rounding import calibrated
from support.zoo import build

from qflow.quant.model.leaf import float_copy
from qflow.quant.trace.calling import batch_size
from qflow.repair.weights.regions import regions_of
from qflow.repair.weights.walk import samples_of


def names_of(name):
    model, example = build(name)
    prepared = calibrated(model, [example])
    samples = samples_of(float_copy(prepared.model), prepared, [(example, batch_size(example))] * 2)
    regions, skipped = regions_of(samples.chunks[0].ops, prepared.weights)
    return [region.name for region in regions], skipped


def test_blocks_are_residual_and_attention_blocks_whatever_their_classes():
    residual = ["stem.0", "blocks.0.conv1 to blocks.0.conv2", "blocks.1.conv1 to blocks.1.conv2", "head"]
    assert names_of("resnet") == (residual, {})
    assert names_of("vision_transformer") == (["patch", "qkv to proj", "mlp.0 to mlp.2", "head"], {})


def test_a_module_of_the_users_is_a_block_if_one_value_goes_in_and_one_comes_out():
    found, _ = names_of("bev")
    assert found[0] == "image.0.0 to image.1"
    assert names_of("unet")[0] == ["down.0", "deep.0", "up", "out"]  # its skip connection leaves each stretch


def test_a_layer_that_runs_several_times_is_refused():
    found, skipped = names_of("shared")
    assert found == []
    assert "several times" in skipped["conv"]

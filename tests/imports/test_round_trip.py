"""What the exporters write is read back: the same mix, the same scales, the same order of sensitivity."""

import pytest
import torch
from support.models import Attention, ResNet
from support.torchvision_ops import declare

import qflow
from qflow.analysis.measures.tables import SensitivityRow, SensitivityTable
from qflow.core.errors import ConfigError
from qflow.core.record import to_json
from qflow.export.model import export_model
from qflow.tasks.digits import DigitsNet
from qflow.tasks.exposure import ExposureNet
from qflow.tasks.perception.model import Detector

NETWORKS = {
    "digits": (DigitsNet, (8, 1, 8, 8)),
    "exposure": (ExposureNet, (4, 1, 8, 8)),
    "perception": (Detector, (2, 3, 64, 64)),
    "timm": (lambda: vit(), (2, 3, 32, 32)),
}
FILES = {
    "plugin": ["plugin/qconfig_j6m.py"],
    "plugin35": ["plugin35/qconfig_j6m.py"],
    "hmct": ["hmct/quant_config.json", "hmct/nodes.csv"],
    "qflow": ["qflow/qflow.json"],
    "qconfig": ["qconfig.json"],
    "check": ["model_check_result.txt"],
}


def vit():
    declare()
    timm = pytest.importorskip("timm")
    return timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=10)


def exported(model, sample, rules, folder):
    """The model with a mix, and everything that qflow writes of it in `folder`."""
    prepared = qflow.prepare(model.eval(), sample, qflow.ModuleNameQconfigSetter(rules))
    qflow.calibrate(prepared, [sample])
    for target in ("plugin", "plugin35", "hmct", "qflow"):
        export_model(prepared, target, folder / target)
    (folder / "qconfig.json").write_text(to_json(prepared.applied))
    (folder / "model_check_result.txt").write_text(qflow.check_text(qflow.check(prepared)))
    return prepared


@pytest.fixture(params=NETWORKS, scope="module")
def mixed(request, tmp_path_factory):
    """A network of a built-in task, or of timm, with every second operator at int16 and an int16 weight."""
    torch.manual_seed(0)
    build, shape = NETWORKS[request.param]
    model, sample = build(), torch.randn(shape)
    folder = tmp_path_factory.mktemp(request.param)
    plain = qflow.prepare(model.eval(), sample)
    graph = plain.graph
    last = next(node for node in reversed(graph.weighted) if node.inputs and graph.sources(node.name))
    alike = {name for node in graph.nodes if len(node.inputs) > 2 for name in graph.sources(node.name)}  # HMCT's limit
    odd = [node.name for node in graph.quantized[1::2] if node.kind.value != "constant" and node.name not in alike]
    rules = dict.fromkeys(odd, "qint16")
    rules |= {last.name: {"weight": "qint16"}, **dict.fromkeys(graph.sources(last.name), "qint8")}
    return plain, exported(model, sample, rules, folder), folder


def dtypes(prepared):
    """What the device computes with: output, weight and requantized inputs of every operator."""
    return {name: (op.output, op.weight, op.input) for name, op in prepared.applied.ops.items()}


def configured(plain, found):
    """The dtypes of a prepared model with the mix that was read."""
    setters = (qflow.ModuleNameQconfigSetter(found.modules), qflow.HighPrecisionOutput(), qflow.TemplateSetter("qint8"))
    qflow.configure(plain, setters)
    return dtypes(plain)


@pytest.mark.parametrize("what", FILES)
def test_the_mix_and_its_scales_come_back(mixed, what):
    plain, prepared, folder = mixed
    found = qflow.read_mix([folder / name for name in FILES[what]], plain)
    assert configured(plain, found) == dtypes(prepared)
    left = {u.name for u in found.unmatched if "constants alone" not in u.reason}
    assert left <= set(prepared.graph.high_precision)  # of which a template says nothing
    known = {name: scale for name, scale in qflow.scales(prepared).items() if name in found.scales}
    assert found.scales == pytest.approx(known, rel=1e-12)
    assert len(known) >= len(prepared.graph.quantized) // 2 if what in ("plugin", "plugin35", "qflow") else not known


def test_fp16_and_input_dtypes_come_back_from_hmct_and_from_the_plugin(tmp_path):
    torch.manual_seed(0)
    model, sample = Attention().eval(), torch.randn(2, 4, 16)
    rules = {"norm": "float16", "[softmax]": "qint16", "proj": {"output": "qint16", "input": ["qint8"]}}
    prepared = exported(model, sample, rules, tmp_path)
    for what in ("plugin", "hmct"):
        plain = qflow.prepare(model, sample)
        found = qflow.read_mix([tmp_path / name for name in FILES[what]], plain)
        assert configured(plain, found) == dtypes(prepared), what


def test_a_quant_config_without_the_nodes_of_an_export_is_matched_by_names_and_says_so(tmp_path):
    torch.manual_seed(0)
    model, sample = Attention().eval(), torch.randn(2, 4, 16)
    prepared = exported(model, sample, {"norm": "qint16", "[softmax]": "qint16"}, tmp_path)
    (tmp_path / "own.json").write_text(
        "/* mine */ " + (tmp_path / "hmct/quant_config.json").read_text().replace("{", "{ // HMCT\n", 1)
    )
    found = qflow.read_mix(tmp_path / "own.json", qflow.prepare(model, sample))
    assert {name for name, op in found.modules.items() if op.get("output") == "qint16"} == {"norm", "[softmax]"}
    (not_sure,) = [u.name for u in found.unmatched if u.name.startswith("/MatMul_1")]
    assert not_sure == "/MatMul_1 = [matmul](1)" and prepared.applied.ops["norm"].output == "qint16"


def test_the_order_of_sensitivity_comes_back_with_scores_of_one_direction(tmp_path):
    """Cosine is least where the operator is most sensitive; the score of the table grows."""
    sample = torch.randn(2, 3, 16, 16)
    prepared = qflow.prepare(ResNet().eval(), sample)
    qflow.calibrate(prepared, [sample])
    rows = tuple(
        SensitivityRow(name, kind, "Conv2d", 1 - cosine, "qint8", 10, outputs=(("0", cosine),))
        for name, kind, cosine in [
            ("blocks.0[add]", "activation", 0.8), ("stem.0", "weight", 0.9), ("stem.0", "activation", 0.99)
        ]
    )  # fmt: skip
    table = SensitivityTable("Cosine", "mean", 2, True, rows, flops=100)
    export_model(prepared, "plugin", tmp_path / "out", sensitivity=table)
    for output in ("0", "merged"):
        read = qflow.read_sensitivity(tmp_path / f"out/output_{output}_Cosine_sensitive_ops.pt", prepared)
        assert [(r.op_name, r.sensitive_type, r.flops) for r in read.rows] == [
            (r.op_name, r.sensitive_type, r.flops) for r in rows
        ]
        assert [r.score for r in read.rows] == pytest.approx([r.score for r in rows])
    torch.save([["other", "activation", "Conv2d", 1.0, "qint8"]], tmp_path / "output_0_L1_sensitive_ops.pt")
    with pytest.raises(ConfigError, match="names operators of the model, but got 'other' and no other in output_0_L1"):
        qflow.read_sensitivity(tmp_path / "output_0_L1_sensitive_ops.pt", prepared)


def test_files_that_belong_together_have_one_digest_whatever_folder_they_lie_in(mixed, tmp_path):
    plain, _, folder = mixed
    files = [folder / name for name in FILES["hmct"]]
    copies = [tmp_path / file.name for file in files]
    for file, copy in zip(files, copies, strict=True):
        copy.write_bytes(file.read_bytes())
    first = qflow.read_mix(files, plain).digest
    assert qflow.read_mix(copies, plain).digest == first
    copies[0].write_text(copies[0].read_text().replace("int16", "int8", 1))
    assert qflow.read_mix(copies, plain).digest != first

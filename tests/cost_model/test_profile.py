"""Reports of the three tools are read as documented and joined to the operators that took the time."""
# Long: the reports of all three tools are built once, and read, damaged and joined by all tests.

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.cost_model.measured import join
from qflow.cost_model.profile import NO_LAYER, LayerTime, MeasuredProfile, read_profile


def instruction(unit, layers, start, working):
    return {"inst_type": unit, "source_layer_names": layers, "start_time (us)": start, "working_time (us)": working}


def row(name, computing, load, store, origin=1):
    return {
        "layer name": name,
        "active period of time": "3 us - 90 us",
        "computing cost (no DDR)": computing,
        "load cost": load,
        "store cost": store,
        "origin ops": origin,
    }


def perf_report():
    return {
        "summary": {
            "performance": {"FPS": 1388.9, "latency (us)": 720.0, "latency (ms)": 0.72},
            "DDR access data": {
                "DDR megabytes per run": 1.4,
                "loaded bytes per run": 1_200_000,
                "stored bytes per run": 300_000,
                "min memory requirement": 8_388_608,
            },
            "interval info": {"interval number": 2, "interval time (ms)": 0.36},
            "layer details": [
                row("/stem/Conv", "59 us (8.2% of model)", "10 us (1.4% of model)", "0 us (0% of model)"),
                row("/head/Conv", "1.5 ms", 20, "0.5 us"),
            ],
            "model info": {
                "BPU march": "nash-m",
                "BPU core number": 1,
                "compiling HBDK version": "4.1.17",
                "double int8 macs": 1_000_000,
                "feature int16 weight int8 macs": "2,000,000",
                "feature int8 weight int16 macs": 0,
                "double int16 macs": 0,
            },
        },
    }


TIMELINE = [
    [
        instruction("LOAD", ["/stem/Conv"], 7, 10),
        instruction("TAE", ["/stem/Conv"], 12, 40),
        instruction("TAE", ["/stem/Conv"], 52, 20),
        instruction("VAE", ["/head/Conv", "/head/Relu"], 67, 30),
        instruction("STORE", [], 97, 10),
    ]
]


def analyzer_report():
    return {
        "hbm_op_time_by_type": {"conv": 100.0},
        "hbm_top_layers_by_total_time": [{"layer": "stem", "total_time_us": 79.0}],
        "hbm_block_time": [{"block": "stem.conv", "total_time_us": 79.0}, {"block": "head", "total_time_us": "21 us"}],
        "hbm_ddr_bytes_per_run": 1_500_000,
        "bc_quantized_model_cpu_ops": ["/post/TopK"],
    }


STAGES = {
    "Stage1-GenerateBpuTask": {"avg_time": 0.1, "max_time": 0.2, "min_time": 0.1},
    "Stage2-BpuCoreProcess": {"avg_time": 1.9, "max_time": 2.1, "min_time": 1.8},
    "Total": {"avg_time": 2.2, "max_time": 2.4, "min_time": 2.0},
}


def log_text(first_line="ucp_version: 3.7.3\n"):
    run = {
        "perf_result": {"FPS": 400.5, "average_latency": 2.49},
        "running_condition": {"core_id": 0, "frame_count": 200, "model_name": "m", "run_time": 500, "thread_num": 1},
    }
    nodes = {
        "model_latency": {"Node-0-BPU-m_subgraph_0": STAGES, "Node-1-CPU-/head/Softmax": {"Total": {"avg_time": 0.2}}},
        "processor_latency": {"BPU_inference_time_cost": {"avg_time": 2.2}},
        "task_latency": {"TaskRunningTime": {"avg_time": 2.4}},
    }
    return f"{first_line}{json.dumps(run, indent=2)}\n***\n{json.dumps(nodes, indent=2)}\n"


@pytest.fixture
def read(tmp_path):
    def written(content, name="report"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return read_profile(path)

    return written


# reading: hbm_perf


def test_a_perf_report_gives_its_summary(read, tmp_path):
    found = read(perf_report(), "anything.txt")
    assert (found.kind, found.path) == ("hbm_perf", str(tmp_path / "anything.txt"))
    assert (found.march, found.toolchain) == ("nash-m", "4.1.17")
    assert (found.total_ms, found.fps) == (0.72, 1388.9)
    assert (found.ddr_bytes, found.memory_bytes) == (1_500_000, 8 * 2**20)
    assert found.macs["double int8"] == 1_000_000
    assert found.macs["feature int16 weight int8"] == 2_000_000
    assert found.overlap is None


def test_without_a_timeline_a_layer_costs_computing_load_and_store(read):
    stem, head = read(perf_report()).layers
    assert (stem.name, stem.ms) == ("/stem/Conv", pytest.approx(0.069))
    assert head.ms == pytest.approx(1.5 + 0.020 + 0.0005)
    assert (stem.ops, stem.units) == ((), {})


def test_a_timeline_is_preferred_to_the_layer_details(read):
    found = read({**perf_report(), "details": TIMELINE})
    stem, head, rest = found.layers
    assert stem.units == pytest.approx({"LOAD": 0.010, "TAE": 0.060})
    assert (stem.name, stem.ms) == ("/stem/Conv", pytest.approx(0.070))
    assert (head.name, head.ops) == ("/head/Conv, /head/Relu", ("/head/Conv", "/head/Relu"))
    assert (rest.name, rest.ops, rest.ms) == (NO_LAYER, (), pytest.approx(0.010))
    assert found.overlap == pytest.approx(1 - 100 / 110)


def test_a_timeline_over_cores_by_name_is_one_period(read):
    cores = {"core 0": [instruction("TAE", "a, b", 0, 60)], "core 1": [instruction("TAE", "b", 10, 60)]}
    found = read({**perf_report(), "details": cores})
    assert {layer.ops: layer.ms for layer in found.layers} == {("a", "b"): 0.06, ("b",): 0.06}
    assert found.overlap == pytest.approx(1 - 70 / 120)


@pytest.mark.parametrize("details", [[], [[]], None, [[instruction("TAE", [], 0, 60)]]])
def test_a_timeline_that_names_no_layer_leaves_the_layer_details(read, details):
    found = read({**perf_report(), "details": details})
    assert [layer.name for layer in found.layers] == ["/stem/Conv", "/head/Conv"]


def test_origin_ops_may_be_listed(read):
    report = perf_report()
    report["summary"]["layer details"] = [row("fused", 7, None, None, ["/stem/Conv", "/stem/Relu"])]
    (layer,) = read(report).layers
    assert (layer.ops, layer.ms) == (("/stem/Conv", "/stem/Relu"), 0.007)


def test_what_is_absent_stays_empty(read):
    found = read({"summary": {"performance": {"latency (us)": 720}}})
    assert found == MeasuredProfile("hbm_perf", found.path, total_ms=0.72)


@pytest.mark.parametrize(
    ("written", "ms"),
    [(59, 0.059), ("59", 0.059), ("59 us", 0.059), ("59us (8.2% of model)", 0.059), ("1.5 ms", 1.5), ("1,500 us", 1.5)]
    + [("2 s", 2000.0), ("500 ns", 0.0005), ("59 µs", 0.059), (1e-5, 1e-8), (0, 0.0)],
)
def test_times_carry_their_unit(read, written, ms):
    found = read({"summary": {"performance": {"latency (us)": written}}})
    assert found.total_ms == pytest.approx(ms)


@pytest.mark.parametrize("written", [-1, "-1 us", "fast", "", "59 cycles", "59 us or so", True, [59], 1e400, "1,5 ms"])
def test_what_is_no_time_is_refused(read, written):
    with pytest.raises(ConfigError, match=r"latency \(us\) is a number, 0 or more .* but got .* in .*report\. "):
        read({"summary": {"performance": {"latency (us)": written}}})


@pytest.mark.parametrize(
    ("ddr", "size"),
    [({"DDR megabytes per run": 1.5}, 1_572_864), ({"DDR megabytes per run": "1.5 MB"}, 1_572_864)]
    + [({"DDR megabytes per run": 9, "loaded bytes per run": "2 KB", "stored bytes per run": 1}, 2049)]
    + [({"loaded bytes per run": 5}, None)],
)
def test_traffic_is_counted_in_bytes(read, ddr, size):
    assert read({"summary": {"performance": {"latency (ms)": 1}, "DDR access data": ddr}}).ddr_bytes == size


# reading: hb_analyzer


def test_a_summary_of_hb_analyzer_gives_blocks_traffic_and_cpu_operators(read):
    found = read(analyzer_report())
    assert (found.kind, found.total_ms, found.ddr_bytes) == ("hb_analyzer", None, 1_500_000)
    assert [(layer.name, layer.ms) for layer in found.layers] == [("stem.conv", 0.079), ("head", 0.021)]
    assert found.cpu_ops == ("/post/TopK",)


def test_the_perf_report_inside_wins_over_block_times(read):
    inner = {**perf_report(), "details": TIMELINE}
    found = read({**analyzer_report(), "perf_json_data": inner, "hbm_ddr_bytes_per_run": None})
    assert (found.kind, found.march, found.total_ms) == ("hb_analyzer", "nash-m", 0.72)
    assert [layer.name for layer in found.layers] == ["/stem/Conv", "/head/Conv, /head/Relu", NO_LAYER]
    assert found.ddr_bytes == 1_500_000


@pytest.mark.parametrize("cpu_ops", [["TopK"], [{"name": "TopK", "type": "TopK"}], {"TopK": 3}])
def test_cpu_operators_come_as_names_records_or_an_object(read, cpu_ops):
    assert read({**analyzer_report(), "bc_quantized_model_cpu_ops": cpu_ops}).cpu_ops == ("TopK",)


# reading: hrt_model_exec


@pytest.mark.parametrize(("first_line", "toolchain"), [("ucp_version: 3.7.3\n", "3.7.3"), ("", "")])
def test_a_profiler_log_gives_segments_and_cpu_nodes(read, first_line, toolchain):
    found = read(log_text(first_line))
    assert (found.kind, found.toolchain, found.total_ms, found.fps) == ("hrt_model_exec", toolchain, 2.49, 400.5)
    segment, node = found.layers
    assert segment == LayerTime("Node-0-BPU-m_subgraph_0", 1.9)
    assert node == LayerTime("Node-1-CPU-/head/Softmax", 0.2, ("/head/Softmax",))
    assert found.cpu_ops == ("/head/Softmax",)


def test_a_segment_without_stages_counts_with_its_total(read):
    text = log_text().replace("Stage2-BpuCoreProcess", "Stage2-Other")
    assert read(text).layers[0].ms == 2.2


# refusals


BAD = {
    "empty": (b"", "an empty one"),
    "blank": (b" \n\n", "an empty one"),
    "binary": (b"\x7fHBM\xff\xfe\x00", "binary data"),
    "null characters": (b"\0\0\0", "Expecting value"),
    "a list": (b"[1, 2]", "got a list"),
    "a number": (b"59", "got 59"),
    "a foreign object": (b'{"layers": [], "name": "m"}', "the keys ['layers', 'name']"),
    "a foreign summary": (b'{"summary": {"text": "good"}}', "the keys ['summary']"),
    "a summary that is a text": (b'{"summary": "good"}', "the keys ['summary']"),
    "only a perf_result": (b'{"perf_result": {"FPS": 3}}', "the keys ['perf_result']"),
    "nested too deeply": (b"[" * 200_000, "complete JSON"),
    "a number of 9999 digits": (b'{"summary": ' + b"9" * 9999 + b"}", "complete JSON"),
    "nothing measured": (b'{"summary": {"model info": {"BPU march": "nash-m"}}}', "but got neither"),
    "a performance list": (b'{"summary": {"performance": [3]}}', "performance is a JSON object, but got a list"),
    "a march of number": (b'{"summary": {"model info": {"BPU march": 3}}}', "BPU march is a text, but got 3"),
    "not a number": (b'{"summary": {"performance": {"latency (ms)": NaN}}}', "got nan"),
    "details of numbers": (
        b'{"summary": {}, "details": [[3]]}',
        "each of details of a core is a JSON object, but got 3",
    ),
    "an instruction without time": (b'{"summary": {}, "details": [[{}]]}', "working_time (us) is a number"),
    "a layer without cost": (b'{"summary": {"layer details": [{"layer name": "a"}]}}', "computing cost (no DDR) is"),
    "a layer without name": (b'{"summary": {"layer details": [{"load cost": 3}]}}', "layer name is a name"),
    "a block without time": (b'{"hbm_block_time": [{"block": "a"}]}', "total_time_us is a number"),
    "a count of cpu operators": (b'{"hbm_block_time": [], "bc_quantized_model_cpu_ops": 3}', "JSON list, but got 3"),
    "a log of one part": (b"ucp_version: 3\n{}\n***\n", "but got 1 in"),
    "a log of three parts": (b"{}\n***\n{}\n***\n{}", "but got 3 in"),
    "a log of other parts": (b'{"a": 1}\n***\n{"b": 1}', "the keys ['a', 'b']"),
    "only a version": (b"ucp_version: 3", "but got 0 in"),
    "a node of number": (b'{"perf_result": {}}\n***\n{"model_latency": {"Node-0": 3}}', "a node of model_latency"),
    "a node without times": (b'{"perf_result": {}}\n***\n{"model_latency": {"Node-0": {}}}', "avg_time is a number"),
    "a log of no times": (b'{"perf_result": {}}\n***\n{"processor_latency": {}}', "but got neither"),
}


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        read_profile(path)
    return str(caught.value)


def outcome(path):
    """Kind of the profile at `path`, or how many lines say that it is none."""
    try:
        return read_profile(path).kind
    except ConfigError as error:
        return "one line" if len(str(error).splitlines()) == 1 else "several lines"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, name):
    content, said = BAD[name]
    path = tmp_path / "report.json"
    path.write_bytes(content)
    message = refusal(path)
    assert said in message
    assert f" in {path}. Export it again with hbm_perf, " in message
    assert ", but got " in message
    assert len(message.splitlines()) == 1


def test_a_directory_and_a_missing_file_are_refused(tmp_path):
    assert "A profile is a file, but got a folder" in refusal(tmp_path)
    assert "'No such file or directory'" in refusal(tmp_path / "none.json")
    assert len(refusal(tmp_path / "two\nlines").splitlines()) == 1
    assert "but got" in refusal("null\0character")


WHOLE = {
    "perf": json.dumps({**perf_report(), "details": TIMELINE}, indent=1),
    "analyzer": json.dumps({**analyzer_report(), "perf_json_data": perf_report()}),
    "log": log_text(),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1))
def test_a_truncated_report_is_refused_in_one_line(tmp_path, name, share):
    text = WHOLE[name].rstrip()
    path = tmp_path / "cut.json"
    path.write_text(text[: int(share * (len(text) - 1))])
    assert len(refusal(path).splitlines()) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["3 us", "a, b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Every path into nested lists and objects."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


REPORT = {**analyzer_report(), "perf_json_data": {**perf_report(), "details": TIMELINE}}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(places(REPORT))[1:]), VALUES)
def test_any_value_anywhere_is_read_or_refused_in_one_line(tmp_path, place, value):
    report = json.loads(json.dumps(REPORT))
    inner = report
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert outcome(path) in ("hb_analyzer", "one line")


# joining


def op(name, kind=OpKind.conv, fused=()):
    return OpNode(name, kind, "op", (), (1, 8, 4, 4), name, fused=fused)


def joined(layers, *nodes):
    made = tuple(x if isinstance(x, LayerTime) else LayerTime(*x) for x in layers)
    return join(MeasuredProfile("hbm_perf", "", layers=made), ModelGraph(nodes, ()))


@pytest.mark.parametrize(
    "name",
    ["/backbone/layer1/conv/Conv", "backbone.layer1.conv", "backbone.layer1.conv.mul", "backbone/layer1/conv/Conv_12"]
    + ["/backbone/backbone.layer1/conv/Conv"],
)
def test_separators_do_not_matter(name):
    assert joined([(name, 2.0)], op("backbone.layer1.conv")).times == {"backbone.layer1.conv": 2.0}


def test_a_repeated_scope_counts_once():
    found = joined([("/layer1/layer1.0/conv1/Conv", 1.0), ("/m.2/cv2.0/cv2.0.0/Conv", 2.0)], op("layer1.0.conv1"))
    assert found.times == {"layer1.0.conv1": 1.0}
    assert joined([("/m.2/cv2.0/cv2.0.0/Conv", 2.0)], op("m.2.cv2.0.0")).times == {"m.2.cv2.0.0": 2.0}


def test_the_longest_path_wins():
    nodes = (op("block"), op("block.conv"), op("block[add]", OpKind.add))
    found = joined([("/block/conv/Add", 1.0), ("/block/other/Conv", 2.0), ("/block/Add", 4.0)], *nodes)
    assert found.times == {"block.conv": 1.0, "block": 2.0, "block[add]": 4.0}


@pytest.mark.parametrize(
    "name", ["block.conv10", "block.conv1_2", "block", "other.block.conv1", "blockconv1", "Conv_12"]
)
def test_a_path_matches_in_whole_parts_from_the_start(name):
    found = joined([(name, 1.0)], op("block.conv1"))
    assert (found.times, found.unmatched) == ({}, (LayerTime(name, 1.0),))
    assert found.without == ("block.conv1",)


def test_underscores_belong_to_names():
    nodes = (op("layer_norm"), op("layer"), op("layer.norm"))
    assert joined([("/layer_norm/Mul_3", 1.0)], *nodes).times == {"layer_norm": 1.0}


def test_times_of_several_layers_add_up():
    layers = [("norm/Mean", 1.0), ("norm/Sub", 2.0), ("norm.rsqrt", 4.0)]
    assert joined(layers, op("norm", OpKind.layer_norm)).times == {"norm": 7.0}


def test_fused_members_are_names_of_their_operator():
    group = op("block[add]", fused=("block.conv2", "block.bn2", "block.relu(1)"))
    found = joined([("/block/conv2/Conv", 1.0), ("/block/relu/Relu", 2.0), ("/block/Add_1", 4.0)], group)
    assert found.times == {"block[add]": 7.0}


def test_calls_of_a_shared_module_divide_its_time():
    found = joined([("/conv/Conv", 3.0), ("/head/Conv", 1.0)], op("conv"), op("conv(1)"), op("conv(2)"), op("head"))
    assert found.times == {"conv": 1.0, "conv(1)": 1.0, "conv(2)": 1.0, "head": 1.0}


def test_origin_ops_divide_their_layer_over_distinct_operators():
    layer = LayerTime("fused_0", 6.0, ("/a/Conv", "/a/Relu", "/b/Conv", "/gone/Conv"))
    assert joined([layer], op("a"), op("b"), op("fused_0")).times == {"a": 3.0, "b": 3.0}


def test_a_layer_with_foreign_origin_ops_goes_by_its_own_name():
    assert joined([LayerTime("/a/Conv", 6.0, ("%12",))], op("a")).times == {"a": 6.0}


def test_a_shared_relu_follows_the_convolution_that_it_is_fused_with():
    nodes = (op("conv1", fused=("relu",)), op("conv2", fused=("relu(1)",)))
    layers = [LayerTime("x", 2.0, ("/conv1/Conv", "/relu/Relu")), LayerTime("y", 6.0, ("/relu/Relu", "/conv2/Conv"))]
    assert joined(layers, *nodes).times == {"conv1": 2.0, "conv2": 6.0}


def test_functionals_match_by_scope_and_function():
    nodes = (op("a[grid_sample]"), op("a[mul]"), op("a[matmul](1)"), op("[softmax]"), op("b[add]"))
    layers = [("/a/GridSample_3", 1.0), ("a.MUL", 2.0), ("/a/MatMul", 4.0), ("Softmax", 8.0), ("a/Add", 16.0)]
    found = joined(layers, *nodes)
    assert found.times == {"a[grid_sample]": 1.0, "a[mul]": 2.0, "a[matmul](1)": 4.0, "[softmax]": 8.0}
    assert found.unmatched == (LayerTime("a/Add", 16.0),)
    assert found.without == ("b[add]",)


def test_a_scope_alone_is_no_functional():
    assert joined([("x.add", 1.0)], op("x.add[add]")).times == {}


def test_inputs_constants_and_moves_are_not_missed():
    nodes = (op("quant[x]", OpKind.input), op("const[pos]", OpKind.constant), op("[flatten]", OpKind.move), op("head"))
    found = joined([("quant/x", 1.0), ("/Flatten", 2.0)], *nodes)
    assert found.times == {"[flatten]": 2.0}
    assert [layer.name for layer in found.unmatched] == ["quant/x"]
    assert found.without == ("head",)


NAMES = st.lists(st.sampled_from(["a", "b", "a.c", "a.c.d", "[add]", "a[mul]", "a[mul](1)", "b(1)"]), unique=True)
LAYERS = st.lists(st.sampled_from(["/a/c/Conv", "a.c.d", "/a/MatMul", "Add_3", "b", "nowhere"]), max_size=6)


@given(NAMES, LAYERS)
def test_no_time_is_lost_or_made_up(names, layers):
    found = joined([LayerTime(n, 1.0 + i, tuple(layers[i:])) for i, n in enumerate(layers)], *map(op, names))
    total = sum(1.0 + i for i in range(len(layers)))
    assert sum(found.times.values()) + sum(layer.ms for layer in found.unmatched) == pytest.approx(total)
    assert set(found.times) | set(found.without) == set(names)
    assert not set(found.times) & set(found.without)

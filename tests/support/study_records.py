"""Records of studies, made up: any number of trials on a network of any size with branches."""

from dataclasses import replace

import numpy as np
from support.synthetic import advice, badcases, layers, sensitivity

from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.report.analysis_page import Analysis
from qflow.report.study_record import Mix, StudyRecord, Training
from qflow.search.domain import Choice, Interval
from qflow.search.health import Searched
from qflow.search.importance import importances
from qflow.search.objective import MINIMIZE, Goal
from qflow.search.outcome import FailedTrial, FinishedTrial, Outcome

SPACE = {
    "calibration.method": Choice(("minmax", "percentile", "mse", "kl")),
    "qconfig.int16_ratio": Interval(0.0, 1.0),
    "calibration.steps": Choice((8, 16)),
}
GOAL = Goal(max_drop=0.01).aimed("accuracy/found", "maximize", ("accuracy/found", "cost/latency_ms"))
FLOAT, SAMPLES = 0.91, 1000


def trial(number, drop, latency, label="", goal=GOAL, tags=None, params=None, **metrics):
    """A finished trial; the metric is float minus `drop`."""
    ratio = 0.3 if params is None else params.get("qconfig.int16_ratio", 0.3)
    found = {
        "accuracy/found": FLOAT - drop, "accuracy/drop": drop, "cost/latency_ms": latency, "cost/bpu_ms": latency - 0.3,
        "cost/latency_low_ms": 0.8 * latency, "cost/latency_high_ms": 1.3 * latency, "qconfig/int16_ratio": ratio,
        "qconfig/n_int16": round(77 * ratio), "calibration/samples": 256.0, **metrics,
    }  # fmt: skip
    point = params or {"calibration.method": "mse", "qconfig.int16_ratio": ratio, "calibration.steps": 16}
    made = Outcome(goal.objectives(found), goal.constraints(found), point, found, tags or {})
    return FinishedTrial(number, f"{number:032x}", point, label, made, 2.0)


def trials(count):
    """All-int16, all-int8, and mixes: more int16 costs time and loses less; every 40th diverged."""
    random = np.random.default_rng(0)
    found = [trial(0, 0.001, 0.81, "all-int16"), trial(1, 0.04, 0.61, "all-int8")]
    for number in range(2, count):
        ratio, method = float(random.uniform()), str(random.choice(SPACE["calibration.method"].values))
        worse = 0.002 * SPACE["calibration.method"].values.index(method)
        drop = 0.9 if number % 40 == 7 else round(0.04 * (1 - ratio) ** 3 + worse + float(random.normal(0, 0.001)), 3)
        point = {
            "calibration.method": method,
            "qconfig.int16_ratio": ratio,
            "calibration.steps": int(random.choice([8, 16])),
        }
        found.append(trial(number, drop, 0.61 + 0.2 * ratio**0.7, params=point))
    return found


def network(count):
    """A graph of `count` operators: an input, a constant, then blocks of two parallel convolutions that are added."""
    nodes = [OpNode("quant[image]", OpKind.input, "QuantStub", (), (1, 3, 64, 64), "quant[image]")]
    nodes.append(OpNode("const[bias]", OpKind.constant, "constant", (), (1, 8, 64, 64), "const[bias]"))
    last = "quant[image]"
    while len(nodes) < count:
        name = f"backbone.block{len(nodes)}"
        for part, inputs in (("left", (last,)), ("right", (last,)), ("join[add]", (f"{name}.left", f"{name}.right"))):
            kind = OpKind.add if part == "join[add]" else OpKind.conv
            weight = None if kind == OpKind.add else f"{name}.{part}"
            own = f"{name}.{part}"
            nodes.append(OpNode(own, kind, f"torch.nn.modules.conv.{kind}", inputs, (1, 8, 64, 64), own, weight))
        last = f"{name}.join[add]"
    nodes = nodes[:count]
    nodes.append(OpNode("head[add]", OpKind.add, "add", (nodes[-1].name, "const[bias]"), (1, 8, 64, 64), "head[add]"))
    nodes.append(OpNode("head[flatten]", OpKind.move, "flatten", ("head[add]",), (1, 32768)))
    return ModelGraph(tuple(nodes), (("0", "head[flatten]"),))


def mix(graph, of, raised=()):
    """A mix with `raised` at int16, the others at int8."""
    ops = {
        node.name: OpQConfig(
            QDtype.qint16 if node.name in raised else QDtype.qint8, QDtype.qint8 if node.weight else None,
            rule="sensitive 0.05: rank 1 of 73" if node.name in raised else "template",
        )
        for node in graph.quantized
    }  # fmt: skip
    times = {n: (0.001 * (1 + i % 7) * (2 if n in raised else 1), 0.0005, 0.02) for i, n in enumerate(ops)}
    return Mix(of, QConfig("nash-m", ops), times)


def record(count=24, operators=77, trained=False, **more):
    """A study of `count` trials on a network of `operators` operators."""
    graph, made = network(operators), trials(count)
    searched = Searched(
        space=SPACE, goal=GOAL, trials=made, failed=[FailedTrial(count, "f" * 32, {}, "all-int8 kl", "not finite")],
        baselines={"all-int16": made[0], "all-int8": made[1]}, accuracy="accuracy/found", float_metric=FLOAT,
        samples=SAMPLES, calibration=(16, 256),
    )  # fmt: skip
    metrics = {"accuracy/drop": MINIMIZE, "cost/latency_ms": MINIMIZE}
    searched = replace(searched, importances=importances(SPACE, made, metrics))
    names = [node.name for node in graph.quantized]
    scores = sensitivity(operators)
    renamed = [replace(r, op_name=names[i % len(names)]) for i, r in enumerate(scores.rows)]
    losses = [2.0 / (1 + i) for i in range(300)]
    return StudyRecord(
        name="perception/int8_int16", searched=searched, asked=[("goal", "drop of at most 0.01")],
        decisions=[("all-int16", "drop +0.0010 under mse meets 0.01"), ("all-int8", "drop +0.0400, 0.0300 beyond")],
        verdict="goal        drop of at most 0.01: met", address="http://127.0.0.1:5000/#/experiments/1/runs",
        commands=[("Register the best trial", "python -m qflow.promote")], graph=graph,
        mixes={"best mix": mix(graph, searched.shown, names[:4]), "all-int8": mix(graph, made[1])},
        analysis=Analysis(layers(operators), replace(scores, rows=tuple(renamed)), badcases(), advice(), None, ()),
        check=([], []), training=Training(made[2], losses, [1e-4] * 300) if trained else None, **more,
    )  # fmt: skip

"""What the tests of the small tasks share: a bench under the shipped rules of nash-m, and a trial's drop."""

from qflow.bench import Bench
from qflow.config.device_file import load_cost, load_rules
from qflow.core.settings import QatSettings, QConfigSettings, TrialSettings
from qflow.tasks.digits import Accuracy
from qflow.tasks.task import make_task

GOAL = 0.01
MISSED = 0.02


def bench_of(name, model, data):
    task = make_task(name=name, model=model, data=data, metric=Accuracy())
    bench = Bench(task, load_rules("nash-m"), load_cost("nash-m"), eval_batch=256)
    bench.measure_float()
    return bench


def drop(bench, qat=None, **qconfig):
    settings = TrialSettings(qconfig=QConfigSettings(**qconfig), qat=qat or QatSettings())
    return bench.run_trial(settings).drop

"""What the tests of the small tasks share: an evaluator under the shipped rules of nash-m, and a trial's drop."""

from qflow.config.device_file import load_cost, load_rules
from qflow.core.settings import QatSettings, QConfigSettings, TrialSettings
from qflow.tasks.digits import Accuracy
from qflow.tasks.task import make_task
from qflow.trial.evaluator import Evaluator

GOAL = 0.01
MISSED = 0.02


def evaluator_of(name, model, data):
    task = make_task(name=name, model=model, data=data, metric=Accuracy())
    evaluator = Evaluator(task, load_rules("nash-m"), load_cost("nash-m"), eval_batch=256)
    evaluator.measure_float()
    return evaluator


def drop(evaluator, qat=None, **qconfig):
    settings = TrialSettings(qconfig=QConfigSettings(**qconfig), qat=qat or QatSettings())
    return evaluator.run_trial(settings).drop

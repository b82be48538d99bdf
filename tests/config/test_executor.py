"""An executor that cannot work is refused before any work, in one line."""

import pytest
from support.compose import BASE, run

REFUSED = {
    "threads": ([BASE, "executor.threads=-3"], "executor.threads lies between 0 and 1024, but got -3"),
    "workers": ([BASE, "executor.workers=2"], "executor.workers is 1 with executor.kind=serial, but got 2. Use exec"),
    "no workers": ([BASE, "executor=process", "executor.workers=0"], "executor.workers lies between 1 and 256"),
    "trial timeout": ([BASE, "executor.trial_timeout=9"], "A trial is ended with its worker process, but got executor"),
    "an executor that does not exist": (
        [BASE, "executor.kind=dask"],
        "is one of serial, process, ray, ray_cluster, but",
    ),
    "a GPU share without Ray": (
        [BASE, "executor=process", "executor.device=cuda", "executor.gpus=0.5"],
        "executor.gpus is what Ray reserves for a trial, but got 0.5 with executor.kind=process",
    ),
    "a share of GPUs": ([BASE, "executor=ray", "executor.gpus=1.5"], "a share of at most 1, or a number of GPUs up to"),
    "a GPU share on the CPU": ([BASE, "executor=ray", "executor.gpus=0.5"], "Use executor.device=cuda."),
    "no GPU share on a GPU": ([BASE, "executor=ray", "executor.device=cuda"], "Use executor.gpus=0.5."),
    "a GPU by number with Ray": (
        [BASE, "executor=ray", "executor.device=cuda:1", "executor.gpus=1"],
        "because Ray chooses the GPU, but got cuda:1. Use executor.device=cuda.",
    ),
    "an address without a cluster": (
        [BASE, "executor=ray", "executor.address=10.0.0.5:6379"],
        "but got it with executor.kind=ray. Use executor=ray_cluster.",
    ),
    "no address": (
        [BASE, "executor=ray_cluster", "executor.address=head"],
        "is auto or <host>:<port> of a Ray cluster, but got 'head'. Use executor.address=auto on a node of it.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_gets_one_line_and_code_2(case, capsys):
    arguments, message = REFUSED[case]
    code, error = run(capsys, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error, error


def test_what_to_install_for_ray_is_said(monkeypatch, capsys):
    monkeypatch.setattr("qflow.executor.ray_runtime.find_spec", lambda name: None)
    code, error = run(capsys, BASE, "executor=ray_cluster")
    assert (code, error) == (
        2,
        "qflow: executor=ray_cluster needs the package ray, but got none here. Install it: pip install 'qflow[ray]'.\n",
    )

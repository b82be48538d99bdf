"""The pictures of the pages in docs/: the report and the analysis of a study of the built-in task.

make screenshots                               runs the study first: minutes
python tests/support/screenshots.py FOLDER     keeps the study in FOLDER, or takes the one that is there
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
STUDY = "perception/int8_int16"
ENDS = {"report": "pareto-front", "analysis": "error-along-the-network"}
"""Page -> the section with which its picture ends."""


def main() -> None:
    """Run the study unless it is there, and photograph its pages."""
    from support.browser import browser, shot

    with tempfile.TemporaryDirectory() as made:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(made)
        out = folder / "qflow_out"
        if not (out / "studies" / STUDY).exists():
            run(folder, "qflow.tune", "+experiment=int8_int16")
        run(folder, "qflow.report", f"study={STUDY}")
        (analysis,) = (out / "artifacts").glob("*/artifacts/analysis/analysis.html")
        with browser(1280, 900) as driver:
            for name, page in {"report": out / "studies" / STUDY / "report.html", "analysis": analysis}.items():
                driver.get(f"file://{page}")
                end = f"return document.getElementById('{ENDS[name]}').getBoundingClientRect().bottom + scrollY"
                shot(driver, ROOT / "docs" / f"{name}.png", height=driver.execute_script(end))


def run(folder: Path, module: str, argument: str) -> None:
    """Run a command as a user with an active environment does, so that the page shows the usual command lines."""
    folder.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "QFLOW_HOME": ""}
    subprocess.run([sys.executable, "-m", module, argument], cwd=folder, env=env, check=True)


if __name__ == "__main__":
    main()

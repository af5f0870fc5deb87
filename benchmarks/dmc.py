"""Runs the papers' DeepMind Control benchmarks over several seeds and compares them with the published curves.

    python benchmarks/dmc.py --model dreamerv3:size12m --tasks walker-walk cheetah-run --seeds 0 1 2 --out results/dmc
    python benchmarks/dmc.py --model tdmpc2:reference-5m --tasks walker-walk --out results/dmc-tdmpc2
    python benchmarks/dmc.py --model dreamerv3:size200m --suite vision --out results/dmc-vision
    python benchmarks/dmc.py --smoke

To resume after an interruption, run the same command again: finished runs are skipped, and the others continue from
their checkpoints. Scores are written to DIR/TASK.csv (step,score,seed; steps of the simulator, including repeated
ones), the comparison to DIR/report.md and .png. The exit code is 1 if a task ended below its accepted score. See
docs/benchmarks.md.
"""

import sys

from protocols import DMC
from suite_runner import main

from worldflux.envs.suites import dmc_name

if __name__ == "__main__":
    sys.exit(main("dmc", DMC, dmc_name, __doc__, sys.argv[1:]))

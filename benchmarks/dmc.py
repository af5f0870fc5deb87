"""DeepMind Control as the papers measured it: learning curves of several seeds, beside the published ones.

    python benchmarks/dmc.py --model dreamerv3:size12m --tasks walker-walk cheetah-run --seeds 0 1 2 --out results/dmc
    python benchmarks/dmc.py --model tdmpc2:reference-5m --tasks walker-walk --out results/dmc-tdmpc2
    python benchmarks/dmc.py --model dreamerv3:size200m --suite vision --out results/dmc-vision
    python benchmarks/dmc.py --smoke

Start the same command again after a kill: finished runs are skipped, others go on from their checkpoints. Scores are in
DIR/TASK.csv (step,score,seed; steps of the simulator, action repeat counted), the comparison in DIR/report.md and .png.
The exit code is 1 if a task ended below its accepted score. See docs/benchmarks.md.
"""

import sys

from protocols import DMC
from suite_runner import main

from worldflux.envs.suites import dmc_name

if __name__ == "__main__":
    sys.exit(main("dmc", DMC, dmc_name, __doc__, sys.argv[1:]))

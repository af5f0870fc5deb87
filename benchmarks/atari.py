"""Runs the Atari benchmarks of DreamerV3's paper over several seeds and compares them with the published curves.

    python benchmarks/atari.py --model dreamerv3:reference-200m --tasks pong boxing --seeds 0 1 --out results/atari100k
    python benchmarks/atari.py --model dreamerv3:reference-200m --suite atari57 --tasks pong --out results/atari
    python benchmarks/atari.py --smoke

To resume after an interruption, run the same command again: finished runs are skipped, and the others continue from
their checkpoints. Scores are written to DIR/GAME.csv (step,score,seed; steps are frames), the comparison to
DIR/report.md and .png. The exit code is 1 if a game ended below its accepted score. See docs/benchmarks.md.
"""

import sys

from protocols import ATARI
from suite_runner import main

from worldflux.envs.suites import atari_name

if __name__ == "__main__":
    sys.exit(main("atari", ATARI, atari_name, __doc__, sys.argv[1:]))

"""Atari as DreamerV3's paper measured it: learning curves of several seeds, beside the published ones.

    python benchmarks/atari.py --model dreamerv3:reference-200m --tasks pong boxing --seeds 0 1 --out results/atari100k
    python benchmarks/atari.py --model dreamerv3:reference-200m --suite atari57 --tasks pong --out results/atari
    python benchmarks/atari.py --smoke

Start the same command again after a kill: finished runs are skipped, others go on from their checkpoints. Scores are in
DIR/GAME.csv (step,score,seed; steps are frames), the comparison in DIR/report.md and .png. The exit code is 1 if a game
ended below its accepted score. See docs/benchmarks.md.
"""

import sys

from protocols import ATARI
from suite_runner import main

from worldflux.envs.suites import atari_name

if __name__ == "__main__":
    sys.exit(main("atari", ATARI, atari_name, __doc__, sys.argv[1:]))

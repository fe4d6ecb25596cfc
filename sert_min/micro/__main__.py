"""Build the micro-world's student, or measure one.

python -m sert_min.micro build --out DIR     # corpus, BPE, pretraining: under 30 minutes on one core
python -m sert_min.micro report              # what the shipped student does
"""

import argparse
from pathlib import Path

from sert_min.io.hub import MICRO
from sert_min.micro import build, measure
from sert_min.micro.world import STUDENT_SEED

p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
p.add_argument("command", choices=("build", "report"))
p.add_argument("--out", default="out/micro-student", help="build: the folder (%(default)s)")
p.add_argument("--model", default=MICRO, help="report: the student (default: the shipped one)")
p.add_argument("--world-seed", type=int, default=STUDENT_SEED, help="build: %(default)s")
p.add_argument("--steps", type=int, default=1600, help="build: optimiser steps (%(default)s)")
args = p.parse_args()
if args.command == "build":
    build.build(Path(args.out), args.world_seed, args.steps)
measure.report(Path(args.out if args.command == "build" else args.model))

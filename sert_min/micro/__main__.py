"""Build or measure the micro-world's student."""

import argparse
from pathlib import Path

from sert_min.io.hub import MICRO
from sert_min.micro import build, measure
from sert_min.micro.world import STUDENT_SEED


def main(args=None):
    """`build` a student or `report` on one."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("command", choices=("build", "report"))
    p.add_argument("--out", help="build: the folder to write")
    p.add_argument("--model", help="report: the student (default: the shipped one)")
    p.add_argument("--world-seed", type=int, help=f"default {STUDENT_SEED}, or the student's own")
    p.add_argument("--steps", type=int, help="build: optimiser steps")
    p.add_argument("--questions", type=int, default=200, help="report: test questions")
    args = p.parse_args(args)

    if args.command == "build":
        given = {"world_seed": args.world_seed, "steps": args.steps}
        folder = Path(args.out or MICRO)
        build.build(folder, **{k: v for k, v in given.items() if v is not None})
        measure.report(folder, args.questions)
    else:
        measure.report(Path(args.model or MICRO), args.questions, args.world_seed)


if __name__ == "__main__":
    main()

"""Show what this kegfast is: version, compiler, instruction sets, CUDA, torch."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> None:
    from kegfast import build_info

    info = build_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return
    width = max(map(len, info))
    for name, value in info.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name:{width}}  {text}")

"""Show the accuracy of a trained model on a data set."""

import argparse

from kegfast.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_data(
        parser, "data set, or an .npz or .safetensors file with samples and labels", required=True
    )
    options.add_model(parser)
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="part (default test)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=128, metavar="N", help="samples at a time (default 128)"
    )
    options.add_compute(parser)


def run(args: argparse.Namespace) -> None:
    from kegfast import data, training

    device = options.pick_device(args.device)
    splits = data.load(args.data, args.root)
    model = options.load_model(args.model, args.weights, splits.info).to(device)
    options.check_fit(model, splits.info)
    part = getattr(splits, args.split)
    accuracy = training.evaluate(model, part, batch_size=args.batch_size, amp=args.amp)
    print(f"{accuracy:.2f} % of {len(part)} samples ({splits.info.name}, {args.split})")

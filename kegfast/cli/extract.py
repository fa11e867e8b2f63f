"""Train generators of artificial data against a trained classifier (KegNet)."""

import argparse

from kegfast.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    parser.add_argument("--generators", type=int, default=5, metavar="N", help="how many (default 5)")
    parser.add_argument(
        "--recipe", default="kegfast", metavar="NAME",
        help="kegfast: short, with BatchNorm statistics; paper: as published (default kegfast)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of all generators at once; default: the recipe's"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="samples per generator; default: the recipe's"
    )
    parser.add_argument("--lr", type=options.number, metavar="X", help="learning rate; default: the recipe's")
    parser.add_argument(
        "--labels", choices=("one-hot", "soft"),
        help="what generators are asked for: a class, or a number per class; default: the recipe's",
    )  # fmt: skip
    parser.add_argument(
        "--faithful", action=argparse.BooleanOptionalAction, default=False,
        help="the teacher in train mode, as the authors run it, for comparison",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile"
    )
    options.add_compute(parser)
    options.add_run(parser, "extract")


def run(args: argparse.Namespace) -> None:
    from kegfast import extract
    from kegfast.training.processes import place

    device = options.pick_device(args.device)
    info = options.sample_info(args)
    teacher = options.load_model(args.model, args.weights, info).to(device)
    options.check_fit(teacher, info)
    with options.Run(args) as folder:
        generators = extract(
            teacher, num_classes=info.num_classes, sample_shape=info.sample_shape,
            input_range=info.input_range, generators=args.generators, recipe=args.recipe, steps=args.steps,
            batch_size=args.batch_size, lr=args.lr, labels=args.labels, faithful=args.faithful,
            compile=args.compile, amp=args.amp, seed=args.seed,
            checkpoint=folder.checkpoint, resume=args.resume, metrics=folder.metrics, progress=True,
        )  # fmt: skip
        if place()[0]:
            return  # rank 0 writes
        generators.save(folder.folder / "generators.safetensors")
        last = generators.history[-1]
        print(
            f"{len(generators)} generators; the teacher agrees with {last['agreement']:.0%} of their labels"
        )
        folder.finish(last)

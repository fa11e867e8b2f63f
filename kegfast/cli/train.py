"""Train a classifier on labeled data."""

import argparse

from kegfast.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_data(
        parser, "data set, or an .npz or .safetensors file with samples and labels", required=True
    )
    options.add_model(parser, weights="optional")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps; or give --epochs")
    parser.add_argument(
        "--epochs", type=options.number, metavar="X", help="passes over the data (default 20)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=128, metavar="N", help="samples of a step (default 128)"
    )
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "adam", "sgd"),
        default="adamw",
        help="sgd with Nesterov momentum 0.9 (default adamw)",
    )
    parser.add_argument(
        "--lr", type=options.number, metavar="X",
        help="highest learning rate, after a twentieth of the steps; a cosine leads to 0 "
        "(default: 2e-3 adamw, 0.1 sgd)",
    )  # fmt: skip
    parser.add_argument(
        "--weight-decay", type=options.number, default=5e-4, metavar="X",
        help="not of biases and normalization (default 5e-4)",
    )  # fmt: skip
    parser.add_argument(
        "--label-smoothing", type=options.number, default=0.0, metavar="X",
        help="share of the target spread over all classes (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--shift", type=int, default=0, metavar="N", help="random shift of images in pixels (default 0)"
    )
    options.add_compute(parser)
    options.add_run(parser, "train")


def run(args: argparse.Namespace) -> None:
    import torch

    from kegfast import data, training
    from kegfast._util.files import load_weights

    device = options.pick_device(args.device)
    splits = data.load(args.data, args.root)
    torch.manual_seed(args.seed)  # the initial weights
    model = options.build_model(args.model, splits.info)
    if args.weights is not None:
        load_weights(model, args.weights)
    model.to(device)
    options.check_fit(model, splits.info)
    with options.Run(args) as folder:
        epochs = 20.0 if args.steps is None and args.epochs is None else args.epochs
        history = training.train(
            model, splits.train, steps=args.steps, epochs=epochs, batch_size=args.batch_size,
            optimizer=args.optimizer, lr=args.lr, weight_decay=args.weight_decay,
            label_smoothing=args.label_smoothing, shift=args.shift, amp=args.amp, seed=args.seed,
            checkpoint=folder.checkpoint, resume=args.resume, metrics=folder.metrics, progress=True,
        )  # fmt: skip
        options.save_model(model, folder.folder / "model.safetensors", args.model)
        accuracy = {name: training.evaluate(model, getattr(splits, name)) for name in ("val", "test")}
        print(f"accuracy {accuracy['val']:.2f} % (validation), {accuracy['test']:.2f} % (test)")
        folder.finish({"accuracy": accuracy, "steps": history[-1]["step"], "loss": history[-1]["loss"]})

"""Teach a compressed student by its teacher, with artificial or unlabeled data."""

import argparse
from pathlib import Path

from kegfast._util.modules import channels_last
from kegfast.cli import options, sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--student", type=Path, required=True, metavar="FILE",
        help="student.safetensors, as `kegfast compress` writes it",
    )  # fmt: skip
    options.add_samples(parser)
    parser.add_argument("--source", nargs="+", required=True, metavar="SOURCE", help=sources.HELP)
    parser.add_argument(
        "--pool", type=int, metavar="N", help="draw so many samples once, instead of fresh ones at each step"
    )
    parser.add_argument(
        "--loss", default="soft_target", metavar="TERMS",
        help="NAME[@LAYER,...][:WEIGHT] joined by +, such as soft_target+rkd_distance:25 "
        "(default soft_target); names: soft_target, hard_label, logit_regression, noisy_logits, decoupled, "
        "hint, attention_transfer, fsp, rkd_distance, rkd_angle, boundary",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=options.number, default=4.0, metavar="X",
        help="by which logits are divided before they become probabilities (default 4)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of Adam (default 1000)")
    parser.add_argument(
        "--batch-size", type=int, default=128, metavar="N",
        help="samples of a step and process (default 128)",
    )  # fmt: skip
    parser.add_argument(
        "--lr", type=options.number, default=1e-3, metavar="X",
        help="first learning rate, which a cosine leads to 0 (default 1e-3)",
    )  # fmt: skip
    parser.add_argument(
        "--student-batchnorm", choices=("train", "eval"), default="train",
        help="eval keeps the running statistics: for noise (default train)",
    )  # fmt: skip
    options.add_evaluate(parser)
    options.add_compute(parser)
    options.add_run(parser, "distill")


def run(args: argparse.Namespace) -> None:

    from kegfast import distill, training
    from kegfast.distillation import Pool
    from kegfast.training.loop import seeded
    from kegfast.training.processes import place, replicated

    device = options.pick_device(args.device)
    info = options.sample_info(args)
    teacher = options.load_model(args.model, args.weights, info).to(device)
    student = options.load_model(args.model, args.student, info).to(device)
    # The faster one in training; torch's stubs lack it.
    channels_last(student)
    for model in (teacher, student):
        options.check_fit(model, info)
    test = options.test_set(args) if args.evaluate else None
    before = None if test is None else training.evaluate(student, test)
    source = sources.make_source(args.source, info, args, device)
    if args.pool is not None:
        with seeded(args.seed):
            source = Pool(source, args.pool)
    rank, world = place()
    if world > 1 and args.resume:
        raise ValueError("resume must be left out under torchrun, where distill keeps no checkpoint")
    with options.Run(args) as folder:
        history = distill(
            replicated(student), teacher, source, loss=args.loss, temperature=args.temperature,
            steps=args.steps, batch_size=args.batch_size, lr=args.lr, amp=args.amp, seed=args.seed,
            student_batchnorm=args.student_batchnorm, checkpoint=None if world > 1 else folder.checkpoint,
            resume=args.resume, metrics=None if rank else folder.metrics, progress=not rank,
        )  # fmt: skip
        if rank:
            return  # rank 0 writes
        options.save_model(student, folder.folder / "student.safetensors", args.model)
        results = dict(history[-1])
        if test is not None and before is not None:
            after = training.evaluate(student, test)
            results |= {"before": before, "after": after}
            print(f"test accuracy {before:.2f} % before, {after:.2f} % after")
        folder.finish(results)

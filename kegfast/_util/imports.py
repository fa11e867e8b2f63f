"""Import paths of what makes a model."""

from kegfast._util.check import expected


def module_and_name(argument: str, path: str) -> tuple[str, str]:
    """The two parts of "package.module:function".

    Raises:
        ValueError: it is no such path; for a file's name with what to write in its place.
    """
    module, _, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if module.endswith(".py") or "/" in module:
        hint = module.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(f"{argument} must name a module, not its file: write {hint}:{name}, got {path!r}")
    if not module or not name.isidentifier():
        raise ValueError(expected(argument, "an import path 'package.module:function'", path))
    return module, name

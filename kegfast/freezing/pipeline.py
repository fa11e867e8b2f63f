"""From a model to its frozen copy: trace, native parts, check."""

import logging
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, fx, nn

from kegfast._util.check import expected
from kegfast._util.inputs import as_inputs, call
from kegfast._util.modules import clone
from kegfast.compression.folding import fuse
from kegfast.compression.rewriting import may_write
from kegfast.freezing.folding import Folding
from kegfast.freezing.frozen import Frozen, Part, item
from kegfast.freezing.network import Step, network_bytes
from kegfast.freezing.replay import Replayed
from kegfast.freezing.steps import Reader
from kegfast.ops import _native

log = logging.getLogger(__name__)

IN_PLACE = {"activation", "add", "multiply"}
"""Kinds of steps that overwrite their first operand where torch is told to."""

MOST_ERROR = 1e-4
"""Largest difference from the model's own answer, of the answer's largest number."""

MOST_ERROR_ON_GPU = 3e-2
"""The same where TF32 or half precision round what every layer answers, folded otherwise than before."""


def freeze(model: nn.Module, example_input: Tensor | Sequence[Tensor]) -> Frozen:
    """The model as one native call, for inference in float32 on the CPU; on a GPU as CUDA graphs.

    The forward pass is traced and becomes a plan: a flat list of convolutions, Tucker-2 layers, poolings,
    Linears, sums and activations, with BatchNorm, ReLU and residual sums in the layers' last stores as by
    `kegfast.fuse`, over buffers laid out ahead and weights packed once. What the plan does not know runs in
    torch between two native parts; `Frozen.report` says what that is.

    On a GPU, in any precision, it is the fused network recorded as one CUDA graph for each size of its
    inputs, after three calls of that size that run as they are; `Frozen.report` has no steps there, and
    `save` nothing to write.

    The copy owns its weights: later changes of the model are not seen. It may be called with other batch and
    image sizes, for which it plans anew once. Its answers carry no gradient; images among them lie in
    channels_last.

    Args:
        model: any module; it stays as it is, and is taken in eval mode.
        example_input: one input of the model (a tensor, or a tuple of them), float32 on the CPU, or all on
            the model's GPU.

    Returns:
        A module that answers what the model answers, up to rounding.

    Raises:
        TypeError: for something other than a module or tensors.
        ValueError: for inputs that are neither float32 on the CPU nor on one GPU.
        RuntimeError: where the compiled part is missing on the CPU, or where the copy's answer to the example
            is not the model's.

    Example:
        >>> frozen = kegfast.freeze(student, torch.zeros(1, 3, 224, 224))
        >>> logits = frozen(images)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    inputs = as_inputs("example_input", example_input)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    on_gpu = all(isinstance(x, Tensor) and x.is_cuda and x.device == inputs[0].device for x in inputs)
    for x in inputs:
        if not on_gpu and not (isinstance(x, Tensor) and x.dtype is torch.float32 and x.is_cpu):
            raise ValueError(expected("example_input", "float32 tensors on the CPU, or all on one GPU", x))
    if _native._C is None and not on_gpu:
        raise RuntimeError(f"freeze needs kegfast's compiled part, which is missing: {_native._why_absent}")
    with torch.no_grad():
        wanted = call(clone(model).eval(), tuple(x.clone() for x in inputs))
        frozen = Frozen(Replayed(fuse(model))) if on_gpu else _frozen(fuse(model), inputs)
        _check(frozen, inputs, wanted, MOST_ERROR_ON_GPU if on_gpu else MOST_ERROR)
    return frozen


def _frozen(folded: nn.Module, inputs: tuple[Tensor, ...]) -> Frozen:
    if not isinstance(folded, fx.GraphModule):
        log.info("%s cannot be traced: it runs in torch", type(folded).__name__)
        return Frozen(folded)
    recorder = _Shapes(folded)
    recorder.run(*(x.clone() for x in inputs))
    if recorder.writes_under_views:
        log.info(
            "%s writes over memory that it goes on to read by a view: it runs in torch", type(folded).__name__
        )
        return Frozen(folded)
    return Frozen(_Partition(folded, recorder.found).run())


class _Shapes(fx.Interpreter):
    """Records the shapes of the float32 tensors among a graph's values, and how its writes reach them."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.found: dict[fx.Node, torch.Size] = {}
        self.writes_under_views = False  # which a plan, whose values have memory of their own, does not see
        self.named = dict(graph.named_modules(remove_duplicate=False))

    def run_node(self, n: fx.Node) -> object:
        if n.op not in ("placeholder", "get_attr", "output") and may_write(n, self.named):
            self.writes_under_views |= any(
                self._is_viewed(self.env[operand]) for operand in n.all_input_nodes
            )
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype is torch.float32 and value.is_cpu and n.op != "output":
            self.found[n] = value.shape
        return value

    def _is_viewed(self, value: object) -> bool:
        """Whether another value that is still to be used lies in the same memory."""
        memory = {t.untyped_storage().data_ptr() for t in _tensors(value)}
        others = (t for t in _tensors(list(self.env.values())) if all(t is not x for x in _tensors(value)))
        return any(t.untyped_storage().data_ptr() in memory for t in others)


class _Partition:
    """Cuts a graph into native parts and what torch runs between them."""

    def __init__(self, graph: fx.GraphModule, shapes: dict[fx.Node, torch.Size]):
        self.graph, self.shapes = graph, shapes
        self.now: dict[fx.Node, fx.Node] = {}  # values that are others' memory, or were overwritten since
        self.modules = dict(graph.named_modules(remove_duplicate=False))
        self.answers: list[fx.Node] = []  # what the model returns

    def run(self) -> fx.GraphModule:
        """A graph whose native parts are modules of their own."""
        self.steps = self._read()
        self.answers = next(n for n in self.graph.graph.nodes if n.op == "output").all_input_nodes
        self._forget_unused()
        root, made = nn.Module(), fx.Graph()
        root.__dict__["_modules"] = dict(self.graph._modules)
        root.__dict__["_parameters"] = dict(self.graph._parameters)
        root.__dict__["_buffers"] = dict(self.graph._buffers)
        env: dict[fx.Node, fx.Node] = {}
        open_steps: list[Step] = []
        for node in self.graph.graph.nodes:
            steps = self.steps.get(node)
            if steps is not None:
                open_steps += steps
                continue
            if node not in self.needed and node.op != "placeholder":
                continue
            if open_steps and node.op not in ("placeholder", "get_attr"):
                self._close(open_steps, node, root, made, env)
                open_steps = []
            env[node] = made.node_copy(node, lambda n: env[n])
        made.lint()
        result = fx.GraphModule(root, made, "FrozenGraph")
        result.delete_all_unused_submodules()
        return result.eval()

    def _read(self) -> dict[fx.Node, list[Step]]:
        """The steps of each node that the native part knows, on the values as they are at that point."""
        reader, found = Reader(self.graph, self.shapes), {}
        for node in self.graph.graph.nodes:
            node.args = fx.map_arg(node.args, lambda n: self.now.get(n, n))
            node.kwargs = fx.map_arg(node.kwargs, lambda n: self.now.get(n, n))
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            steps = reader.steps(node)
            if steps is None:
                continue
            x = node.args[0] if node.args else node.all_input_nodes[0]
            found[node] = steps
            if not steps:
                self._replace(node, x)
            elif steps[-1].kind in IN_PLACE and may_write(node, self.modules):
                self._replace(x, node)
        return found

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        self.now[old] = new
        for value, current in list(self.now.items()):
            if current is old and value is not new:
                self.now[value] = new
        self.now.pop(new, None)

    def _forget_unused(self) -> None:
        self.needed: set[fx.Node] = set()
        for node in reversed(list(self.graph.graph.nodes)):
            steps = self.steps.get(node)
            if steps is not None:
                if node in self.needed:
                    self.needed.update(v for step in steps for v in step.operands if isinstance(v, fx.Node))
                else:
                    self.steps[node] = []
            elif node.op == "output" or node in self.needed or may_write(node, self.modules):
                self.needed.add(node)
                self.needed.update(node.all_input_nodes)

    def _close(
        self, steps: list[Step], before: fx.Node, root: nn.Module, made: fx.Graph, env: dict[fx.Node, fx.Node]
    ) -> None:
        """Emits a native part of these steps in front of a node."""
        own = {step.value for step in steps}
        outputs = [value for value in own if isinstance(value, fx.Node) and self._used_from(value, before)]
        outputs.sort(key=[*self.answers, *(step.value for step in steps)].index)
        shapes: dict[Hashable, tuple[int, ...]] = {
            value: tuple(shape) for value, shape in self.shapes.items()
        }
        steps = Folding(steps, outputs, shapes).folded()
        own = {step.value for step in steps}
        used = {v for step in steps for v in step.operands if v not in own}
        inputs = [node for node in self.graph.graph.nodes if node in used]
        name = f"native{sum(key.startswith('native') for key in root._modules)}"
        part = Part(
            network_bytes(inputs, steps, outputs), [(step.kind, step.name) for step in steps], len(outputs)
        )
        root._modules[name] = part
        result = made.call_module(name, tuple(env[v] for v in inputs))
        for i, value in enumerate(outputs):
            env[value] = result if len(outputs) == 1 else made.call_function(item, (result, i))

    def _used_from(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether a node or one behind it uses a value."""
        while node.op != "root":
            steps = self.steps.get(node)
            uses = node.all_input_nodes if steps is None else [v for step in steps for v in step.operands]
            if value in uses and (steps is not None or node in self.needed):
                return True
            node = node.next
        return False


def _check(frozen: Frozen, inputs: tuple[Tensor, ...], wanted: object, most: float) -> None:
    got = frozen(*inputs)
    for ours, theirs in zip(_tensors(got), _tensors(wanted), strict=True):
        if ours.shape != theirs.shape:
            raise RuntimeError(
                f"the frozen copy answers with {tuple(ours.shape)}, the model with {tuple(theirs.shape)}"
            )
        if theirs.numel() == 0 or not theirs.is_floating_point() or not theirs.isfinite().all():
            continue
        error = (ours.double() - theirs.double()).abs().max().item()
        largest = theirs.double().abs().max().item()
        if not error <= most * max(largest, 1e-30):
            raise RuntimeError(
                f"the frozen copy's answer to example_input is off by {error:.3g} of {largest:.3g}"
            )


def _tensors(value: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]

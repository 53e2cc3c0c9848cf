"""How the compiler is told of our products: they are kernels of its own making, so they share its memory plan.

It touches the inside of torch's compiler, which the pinned version of torch keeps still. Imported only to compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._inductor import ir, lowering  # the next one cannot be imported before these
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.utils import Placeholder

from fedtower.plugins.runtimes.vectorized.products import SOURCE, Operand, body, is_crossed, is_small

_OPERATIONS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


@contextmanager
def small_products() -> Iterator[None]:
    """While this lasts, the compiler makes small products of floats by :mod:`.products`, and others by the library."""
    known = lowering.lowerings
    theirs: dict[Any, Any] = {each: known[each] for each in _OPERATIONS}
    known.update({each: partial(_lowered, library) for each, library in theirs.items()})
    try:
        yield
    finally:
        known.update(theirs)


def _lowered(library: Any, left: Any, right: Any, **settings: Any) -> Any:
    """The node of a product in the compiler's graph."""
    (m, k), n = left.get_size()[-2:], right.get_size()[-1]
    if settings or left.get_dtype() != torch.float32 or not is_small(int(m), int(k), int(n)):
        return library(left, right, **settings)
    left, right = realize_inputs(left, right)  # type: ignore[no-untyped-call]
    for operand in (left, right):
        ir.as_storage_and_layout(operand, freeze=True)
    crossed = is_crossed(_operand("", left), _operand("", right))
    size = [*left.get_size()[:-1], n]
    stride = [m * n, 1, m] if crossed else [m * n, n, 1]
    layout = ir.FixedLayout(left.get_device(), left.get_dtype(), size, stride[-len(size) :])
    buffer = ir.CppTemplateBuffer(layout, [left, right], _Product(left, right).kernel, None, None)  # type: ignore[arg-type]
    buffer.allow_epilogue_fusion = False
    return ir.TensorBox.create(buffer)


@dataclass(frozen=True)
class _Product:
    """One product of a graph, in the compiler's terms."""

    left: Any
    right: Any

    def kernel(self, node: Any, **_: Any) -> tuple[Any, Any]:
        """A kernel, and what writes its source: what the compiler asks of a template."""
        kernel: Any = CppTemplateKernel(str(Placeholder.KERNEL_NAME), num_threads=1)  # type: ignore[no-untyped-call]
        return kernel, lambda: kernel.render(self, node=node)

    def render(self, kernel: Any, node: Any) -> str:
        """The source of the kernel."""
        head = kernel.def_kernel(inputs={"A": self.left, "B": self.right}, outputs={"C": node})
        first = [0] * len(node.get_size())
        left, right = (_operand(f"&{kernel.index(each, first)}", each) for each in (self.left, self.right))
        return f'{SOURCE}\nextern "C" {head}\n{{{body(left, right, _operand("C", node))}}}\n'


def _operand(place: str, node: Any) -> Operand:
    return Operand(place, [int(n) for n in node.get_size()], [int(n) for n in node.get_stride()])

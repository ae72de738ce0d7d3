"""What the text of a compiled program says: its products, its copies inside loops, and its exchanges between chips.

An instruction there, without what is not read here:

    %fusion.3 = bf16[64,768]{1,0:T(8,128)(2,1)} fusion(%copy.1), calls=%fused.3, metadata={op_name="jit/add"}

A TPU computes nearly all products as convolutions, most of them inside fusions.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
COPIES = ("copy", "transpose")
PREFETCHES = ("copy-done", "slice-done")  # what was begun before, as copy-start
PRODUCTS = ("convolution", "dot")
WORK = (*PRODUCTS, "fusion", "while")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8} | {
    f"{sign}{8 * size}": size for sign in "su" for size in (1, 2, 4, 8)
}
LARGE = 2**20

_IGNORED = re.compile(r"(?<=\])\{[^}]*\}|/\*.*?\*/")  # layouts and the numbering of operands
_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def size(self) -> int:
        return int(np.prod(self.dims, dtype=int))

    @property
    def bytes(self) -> int:
        return self.size * BYTES.get(self.dtype, 0)  # such as a token's


class Instruction(NamedTuple):
    """`shapes`: of the result, several of a tuple; `arguments`: what its parentheses hold; `attributes`: the rest."""

    name: str
    opcode: str
    shapes: list[Shape]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,]+)", self.arguments)

    @property
    def op_name(self) -> str:
        """What JAX calls it."""
        return _find(r'op_name="([^"]*)"', self.attributes)

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


Computation = dict[str, Instruction]  # in the order in which they run


class Visit(NamedTuple):
    """An instruction where it runs: `times`, by the loops around it; `looped`: in any; `fused`: as part of a fusion."""

    instruction: Instruction
    computation: Computation
    times: int
    looped: bool
    fused: bool

    def operand_shapes(self) -> list[Shape]:
        return [self.computation[name].shapes[0] for name in self.instruction.operands]


class Exchange(NamedTuple):
    """`runs`: synchronous or how else; `shapes`: of the result."""

    kind: str
    runs: str
    shapes: list[Shape]

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def sent(self, devices: int) -> int:
        """Bytes that a device sends where all of them form a ring, which is the least that it takes."""
        others = devices - 1
        times = {"all-reduce": 2 * others, "reduce-scatter": devices * others, "collective-permute": devices}
        return self.bytes * times.get(self.kind, others) // devices


class Module:
    """A compiled program, of `jax.stages.Compiled.as_text()`; `partitions`: among how many devices it is divided."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.partitions = int(_find(r"^HloModule .*num_partitions=(\d+)", text) or 1)
        for line in _IGNORED.sub("", text).splitlines():
            if head := _COMPUTATION.match(line):
                computation = self.computations[head[2]] = {}
                if head[1]:
                    self.entry = head[2]
            elif found := _INSTRUCTION.match(line):
                root, name, shape, opcode, arguments, attributes = found.groups()
                shapes = [
                    Shape(dtype, tuple(map(int, filter(None, dims.split(",")))))
                    for dtype, dims in _SHAPE.findall(shape)
                ]
                computation[name] = Instruction(name, opcode, shapes, arguments, attributes, bool(root))

    def called(self, instruction: Instruction) -> list[Computation]:
        """The computations that an instruction runs: of a loop, the condition and the body."""
        names = re.findall(r"%([\w.-]+)", instruction.attributes)
        return [self.computations[name] for name in names if name in self.computations]

    def walk(self) -> Iterator[Visit]:
        """Every instruction that may run, from the entry on; those that are called from several places, for each."""

        def visit(computation: Computation, times: int, looped: bool, fused: bool) -> Iterator[Visit]:
            for instruction in computation.values():
                yield Visit(instruction, computation, times, looped, fused)
                loop = instruction.opcode == "while"
                inside = times * (self.trips(instruction, computation) or 1) if loop else times
                for called in self.called(instruction):
                    yield from visit(called, inside, looped or loop, fused or instruction.opcode == "fusion")

        return visit(self.computations[self.entry], 1, looped=False, fused=False)

    def trips(self, loop: Instruction, computation: Computation) -> int | None:
        """How often a loop runs at most: as it says, or where its condition wants a counter below a constant, to which
        the body adds one (or another constant); None if that is not to be read."""
        if known := _find(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known)
        condition = self.computations[_find(r"condition=%([^\s,]+)", loop.attributes)]
        for compare in condition.values():
            if compare.opcode == "compare" and "direction=LT" in compare.attributes:
                counter, limit = (condition[name] for name in compare.operands)
                if (counter.opcode, limit.opcode) == ("get-tuple-element", "constant"):
                    index = int(_find(r"index=(\d+)", counter.attributes))
                    start = computation[computation[loop.operands[0]].operands[index]]
                    while start.opcode == "copy":
                        start = computation[start.operands[0]]
                    left = int(limit.arguments) - (int(start.arguments) if start.opcode == "constant" else 0)
                    return -(-left // self.stride(loop, index))
        return None

    def stride(self, loop: Instruction, index: int) -> int:
        """What a loop's body adds to the counter in this place, as far as that is to be read: products that the TPU's
        compiler divides into the steps of an exchange are taken two at a time."""
        body = self.computations[_find(r"body=%([^\s,]+)", loop.attributes)]
        last = next(part for part in body.values() if part.is_root)
        following = body.get(last.operands[index])
        if following is None or following.opcode != "add":
            return 1
        added = [body[name].arguments for name in following.operands if body[name].opcode == "constant"]
        return int(added[0]) if added else 1

    def is_copy(self, instruction: Instruction) -> bool:
        """Whether it is a copy or a transpose, or a fusion that ends in one."""
        if instruction.opcode != "fusion":
            return instruction.opcode in COPIES
        (inside,) = self.called(instruction)
        last = next(part for part in inside.values() if part.is_root)
        while last.opcode == "bitcast":
            last = inside[last.operands[0]]
        return self.is_copy(last)

    def collective(self, visit: Visit) -> Exchange | None:
        """The exchange that begins here, if one does.

        It is asynchronous where it has a start and a done, and beside other work if the schedule has any in between.
        The TPU's compiler may also make steps of an exchange parts of fusions that compute; then the start and the done
        are fusions too. Its reduce-scatter is a fusion of an all-reduce and what takes a part of that.
        """
        start = visit.instruction
        if start.opcode == "fusion" and "calls=%all-reduce-scatter" in start.attributes and not visit.fused:
            return Exchange("reduce-scatter", "synchronous", start.shapes)
        fused = start.name.startswith("async-collective-start")
        parts = self.called(start)[0].values() if fused else [start]
        kinds = [part.opcode.removesuffix("-start") for part in parts]
        kind = next((kind for kind in kinds if kind in COLLECTIVES), None)
        if kind is None or visit.fused:
            return None
        if start.opcode == kind:
            return Exchange(kind, "synchronous", start.shapes)

        def ends(part: Instruction) -> bool:
            return part.name.startswith("async-collective-done") if fused else start.name in part.operands

        scheduled = list(visit.computation.values())
        after = scheduled[scheduled.index(start) + 1 :]
        done = next(filter(ends, after))
        busy = any(part.opcode in WORK for part in after[: after.index(done)])
        return Exchange(kind, "beside other work" if busy else "asynchronous, but alone", done.shapes)


def _largest(shapes: list[Shape]) -> dict[str, Any]:
    largest = max(shapes, key=lambda shape: shape.bytes)
    return {"bytes": largest.bytes, "of": str(largest)}


def _find(pattern: str, text: str) -> str:
    return found[1] if (found := re.search(pattern, text)) else ""


def product_flops(product: Instruction, left: Shape, right: Shape) -> int:
    """Two a multiplication, of numbers that are there: not of the zeros that a convolution is padded and dilated with,
    as those are that stand for many products."""
    result = product.shapes[0]
    if product.opcode == "dot":
        axes = _find(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
        return 2 * result.size * int(np.prod([left.dims[int(axis)] for axis in axes.split(",") if axis], dtype=int))

    names = re.split("_|->", _find(r"dim_labels=([^,\s]+)", product.attributes))
    inputs, kernel, outputs = (
        dict(zip(labels, shape.dims, strict=True)) for labels, shape in zip(names, (left, right, result), strict=True)
    )
    window = dict(setting.split("=") for setting in _find(r"window=\{([^}]*)\}", product.attributes).split())

    def setting(name: str, axis: str, default: int) -> int:
        return int(window[name].split("x")[int(axis)].split("_")[0]) if name in window else default

    flops = 2 * outputs["b"] * outputs["f"] * kernel["i"]
    for axis in filter(str.isdigit, outputs):
        starts = np.arange(outputs[axis])[:, None] * setting("stride", axis, 1) - setting("pad", axis, 0)
        reached = starts + np.arange(kernel[axis]) * setting("rhs_dilate", axis, 1)
        dilation = setting("lhs_dilate", axis, 1)
        inside = (reached >= 0) & (reached <= dilation * (inputs[axis] - 1))
        flops *= int(np.sum(inside & (reached % dilation == 0)))
    return flops


def describe(module: Module) -> dict[str, Any]:
    """How often each loop runs (None: unknown, taken as once); the cycles that the TPU's compiler expects, of what it
    expects any of; exchanges; products, those with a float32 operand apart; copies, and those that run beside other
    work ("prefetches"), of more than 1 MB inside loops.

    `count` counts instructions; cycles, FLOPs and bytes are of all times that they run. Of exchanges, `bytes` are the
    results', `sent` what each of the program's `partitions` sends (`Exchange.sent`), and `largest` is one array.
    """
    loops: list[int | None] = []
    collectives: dict[tuple[str, str], list[tuple[int, Exchange]]] = defaultdict(list)
    cycles, products, float32, copies, prefetches = [], [], [], [], []
    for visit in module.walk():
        instruction, times = visit.instruction, visit.times
        if expected := _find(r'"estimated_cycles":"(\d+)"', instruction.attributes):
            cycles.append((times * int(expected), str(instruction.shapes[0]), visit))
        if instruction.opcode == "while":
            loops.append(module.trips(instruction, visit.computation))
        elif instruction.opcode in PRODUCTS:
            left, right = visit.operand_shapes()
            product = (times * product_flops(instruction, left, right), f"{left} * {right}", visit)
            products.append(product)
            if "f32" in (left.dtype, right.dtype):
                float32.append(product)
        elif collective := module.collective(visit):
            collectives[collective.kind, collective.runs].append((times, collective))
        elif visit.looped and not visit.fused and instruction.bytes > LARGE:
            moved = (times * instruction.bytes, str(instruction.shapes[0]), visit)
            if instruction.opcode in PREFETCHES:
                prefetches.append(moved)
            elif module.is_copy(instruction):
                copies.append(moved)
    return {
        "partitions": module.partitions,
        "loops": loops,
        "cycles": _summary("cycles", cycles, named=8),
        "collectives": [
            {
                "kind": kind,
                "runs": way,
                "count": len(exchanges),
                "bytes": sum(times * exchange.bytes for times, exchange in exchanges),
                "sent": sum(times * exchange.sent(module.partitions) for times, exchange in exchanges),
                "largest": _largest([shape for _, exchange in exchanges for shape in exchange.shapes]),
            }
            for (kind, way), exchanges in collectives.items()
        ],
        "products": _summary("flops", products, named=0),
        "float32": _summary("flops", float32),
        "copies": _summary("bytes", copies),
        "prefetches": _summary("bytes", prefetches, named=0),
    }


def _summary(unit: str, found: list[tuple[int, str, Visit]], named: int = 4) -> dict[str, Any]:
    largest = [
        {unit: amount, "times": visit.times, "of": shapes, "op_name": visit.instruction.op_name}
        for amount, shapes, visit in sorted(found, key=lambda entry: -entry[0])[:named]
    ]
    total = {"count": len(found), unit: sum(amount for amount, _, _ in found)}
    return {**total, "largest": largest} if largest else total

"""A pickle read as what it is, a program of a stack machine, by a machine that can make tables and tensors alone.

Python's own machine imports whatever a pickle names and calls it with whatever it holds. This one imports and calls
nothing. A name ("os", "system") becomes a `Name`, two strings. A call is carried out by us for the few functions that
torch writes (`_call`); of the objects that training programs leave beside weights an inert `Thing` is made, which
remembers its name alone. Every other call ends the reading: a file that asks for more is not to be trusted with less.
"""

import pickletools
from typing import Any, NamedTuple

from ldm.errors import LDMError
from ldm.io.folders import AGAIN

# Far above every real checkpoint. Work is counted in items that are walked or copied: a step of the machine is as dear
# as four of them, a name that is looked up in our lists as eight.
MOST_BYTES, MOST_WORK, STEP, LOOKUP = 20_000_000, 2_000_000, 4, 8
MOST_LETTERS, MOST_ITEMS, MOST_NAMES = 1000, 8, 100  # of a name; of a key that is a tuple; that a sentence could tell
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {  # those whose argument is what they push
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
STORAGES = {  # torch's classes -> what safetensors calls the type
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
}  # fmt: skip
UNTYPED = "UntypedStorage"  # of newer types, which stand beside the tensor
TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "complex128": "C128",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
# What training programs leave beside weights: these functions and classes, and every class of these packages.
HARMLESS = {
    "argparse.Namespace", "collections.Counter", "collections.defaultdict", "collections.deque", "_codecs.encode",
    "copy_reg._reconstructor", "copyreg._reconstructor", "datetime.datetime", "datetime.timedelta",
    "diffusers.configuration_utils.FrozenDict", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray",
    "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer",
    "torch.device", "torch.nn.parameter.Parameter", "torch.torch_version.TorchVersion", "types.SimpleNamespace",
    *(f"{m}.{n}" for m in ("pathlib", "pathlib._local")
      for n in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"{m}.{n}" for m in ("builtins", "__builtin__")
      for n in ("set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bytes", "bytearray", "str",
                "slice", "range", "object")),
}  # fmt: skip
PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf")
OF_WEIGHTS = {
    "collections.OrderedDict", f"torch.storage.{UNTYPED}", *(f"torch.{each}" for each in (*STORAGES, *TYPES, "Size")),
}  # fmt: skip


class Name(NamedTuple):
    """A name that a pickle asks for: never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def harmless(self) -> bool:
        if self.module.partition(".")[0] not in PACKAGES:
            return str(self) in HARMLESS
        return self.name.replace(".", "").isidentifier() and self.name.rpartition(".")[2][:1].isupper()

    @property
    def of_weights(self) -> bool:
        return str(self) in OF_WEIGHTS or (self.module == "torch._utils" and self.name.startswith("_rebuild_"))


class Thing(NamedTuple):
    """What stands in place of an object that isn't built. Of its name a program may make a million: it isn't copied."""

    name: Name | str


class Storage(NamedTuple):
    """A record of numbers: its name in the archive, its type ("" if the tensor says it), and how many there are."""

    key: str
    dtype: str
    count: int


class Layout(NamedTuple):
    """A tensor: a window on a storage, in numbers (not bytes)."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(program: bytes, what: str) -> Any:
    """What the program leaves: dicts, lists, tuples, numbers and strings, `Layout`s, `Name`s and `Thing`s.

    The program is at most MOST_BYTES long. Raises LDMError, which begins with `what`, for one that is damaged, makes
    too much work, or asks for anything else.
    """
    try:
        return _Machine(what).run(program)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # an empty stack, a cut string, ...
        raise LDMError(f"{what} has a damaged pickle ({str(error)[:100]!r}): {AGAIN}.") from error


def names_in(program: bytes) -> list[str]:
    """The names that a pickle asks for and that are no part of weights, as far as it can be read; nothing is run.

    The first letters of the first ones: a program may put two texts of megabytes together a million times.
    """
    names: dict[Name, None] = {}
    texts, memory = ["", ""], {}  # texts: the last two, which STACK_GLOBAL takes
    try:
        for number, (opcode, value, _) in enumerate(pickletools.genops(program)):
            if opcode.name in ("GLOBAL", "INST"):
                _note(names, *value.split(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                _note(names, *texts)
            elif opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memory[len(memory) if value is None else value] = texts[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                texts = [texts[-1], memory.get(value, "")]
            elif isinstance(value, str):
                texts = [texts[-1], value[:MOST_LETTERS]]
            if number > MOST_WORK // STEP or len(names) >= MOST_NAMES:
                break
    except ValueError:  # it is cut off
        pass
    return [str(name) for name in names]


def _note(names: dict[Name, None], module: str, of: str) -> None:
    name = Name(module[:MOST_LETTERS], of[:MOST_LETTERS])
    if name not in names and not (name.harmless or name.of_weights):
        names[name] = None


class _Machine:
    def __init__(self, what: str):
        self.what = what
        self.work = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memory: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for opcode, value, _ in pickletools.genops(program):
            self._spend(STEP)
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, value)
        raise ValueError("it has no end")

    def _spend(self, items: int) -> None:
        """A step may walk a list of any length, and the next one the same list again: so it isn't steps that count."""
        self.work += items
        if self.work > MOST_WORK:
            most = f"more than {MOST_WORK // STEP} steps, or of steps that make as much work"
            raise LDMError(f"{self.what} has a pickle of {most}: do not trust this file.")

    def _step(self, opcode: str, value: Any) -> None:
        push, pop = self.stack.append, self._pop
        if opcode in LITERALS:
            push(value if type(value) is not int or abs(value) < 2**63 else Thing("a number beyond 64 bits"))
        elif opcode in CONSTANTS:
            push(CONSTANTS[opcode])
        elif opcode in EMPTY:
            push(EMPTY[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memory[len(self.memory) if value is None else value] = self._top()
        elif opcode in ("BINGET", "LONG_BINGET"):
            push(self.memory[value])
        elif opcode == "MARK":
            self.marks.append(len(self.stack))
        elif opcode in ("TUPLE", "FROZENSET"):
            push(tuple(self._to_mark()))
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(reversed([pop() for _ in range(int(opcode[-1]))])))
        elif opcode in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [pop()] if opcode == "APPEND" else self._to_mark()
            self._append(self._top(), items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = [pop(), pop()][::-1] if opcode == "SETITEM" else self._to_mark()
            self._put(self._top(), items[::2], items[1::2])
        elif opcode == "GLOBAL":
            push(_name(*value.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = pop(), pop()
            push(_name(module, name))
        elif opcode == "BINPERSID":
            push(self._storage(pop()))
        elif opcode in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if opcode == "NEWOBJ_EX":
                pop()
            arguments, function = pop(), pop()
            push(self._call(function, arguments))
        elif opcode == "BUILD":  # gives an object its state, such as the versions beside a state dict
            pop()
            self._top()
        elif opcode == "POP":
            pop()
        elif opcode == "POP_MARK":
            self._to_mark()
        elif opcode not in ("PROTO", "FRAME"):
            raise LDMError(
                f"{self.what} has a pickle with {opcode}, which torch doesn't write: do not trust this file."
            )

    def _top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("its stack is empty")
        return self.stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self.stack.pop()

    def _to_mark(self) -> list[Any]:
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def _append(self, onto: Any, items: list[Any]) -> None:
        if type(onto) is list:
            onto.extend(items)
        elif type(onto) is not Thing:
            raise ValueError("it appends to what is no list")

    def _put(self, table: Any, keys: list[Any], values: list[Any]) -> None:
        if type(table) is Thing:
            return
        if type(table) is not dict:
            raise ValueError("it sets an entry of what is no table")
        for key, value in zip(keys, values, strict=True):
            if type(key) is not str:  # its hash can be foreseen, and a table be filled with keys that collide
                self._spend(len(table) // 16)
            if _key(key) in table:  # Python would let the second win, in silence
                raise ValueError("a key stands twice")
            table[key] = value

    def _storage(self, line: Any) -> Storage:
        sort, of, key, _, count = line
        texts = type(key) is str and len(key) <= MOST_LETTERS and type(of) is Name
        if sort != "storage" or not texts or not _whole(count):
            raise ValueError("a storage is described wrongly")
        if of == ("torch.storage", UNTYPED):
            return Storage(key, "", count)
        if of.module != "torch" or of.name not in STORAGES:
            raise LDMError(f"{self.what} stores {str(of)[:100]!r}, which ldm doesn't read: take float weights.")
        return Storage(key, STORAGES[of.name], count)

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(arguments) is not tuple:
            raise ValueError("a call is given no tuple")
        self._spend(len(arguments))
        name = str(function) if type(function) is Name else ""
        if name == "collections.OrderedDict":
            return self._table(*arguments)
        if name == "torch.Size":
            return self._size(*arguments)
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            return self._layout(name[-1] == "3", *arguments)
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            if type(arguments[0]) is not Layout:
                raise ValueError("a parameter is no tensor")
            return arguments[0]
        if type(function) is Name and function.harmless and self._harmless(arguments):
            return Thing(function)
        called = f"what {function.name} gives" if type(function) is Thing else name or type(function).__name__
        raise LDMError(
            f"{self.what} asks to call {called[:100]!r}, which is no part of weights; nothing was run: do not trust "
            "this file, or take its safetensors version."
        )

    def _harmless(self, arguments: tuple) -> bool:
        """`_reconstructor`, `_reconstruct` and `defaultdict` are given a class or function to call."""
        self._spend(LOOKUP * len(arguments))
        return all(type(each) is not Name or each.harmless or each.of_weights for each in arguments)

    def _table(self, pairs: Any = ()) -> dict:
        table: dict = {}
        self._spend(STEP * len(_row(pairs)))
        for key, value in pairs:
            self._put(table, [key], [value])
        return table

    def _size(self, sizes: Any) -> tuple[int, ...]:
        self._spend(len(_row(sizes)))
        if not all(_whole(n) for n in sizes):
            raise ValueError("a size is no whole number")
        return tuple(sizes)

    def _layout(self, third: bool, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Layout:
        _, _, *rest = rest  # whether it is trained, and hooks
        of = rest.pop(0) if third else None
        if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
            raise ValueError("a tensor is described wrongly")
        self._spend(len(shape) + len(stride))
        dtype = TYPES[of.name] if type(of) is Name and of.module == "torch" else storage.dtype
        if not dtype:
            raise ValueError("a tensor has no type")
        if any(rest):  # "conj" and "neg": the numbers are not those that are stored
            raise LDMError(f"{self.what} holds a tensor that is stored conjugated or negated: save it resolved.")
        if not all(_whole(n) for n in (offset, *shape, *stride)) or len(shape) != len(stride):
            raise ValueError("a tensor is laid out impossibly")
        return Layout(storage, dtype, offset, shape, stride)


def _whole(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _row(items: Any) -> tuple | list:
    if type(items) not in (tuple, list):
        raise ValueError("a list is none")
    return items


def _name(module: Any, name: Any) -> Name:
    if type(module) is not str or type(name) is not str or len(module) + len(name) > MOST_LETTERS:
        raise ValueError(f"a name is no text of at most {MOST_LETTERS} letters")
    return Name(module, name)


def _key(key: Any) -> Any:
    """A key is hashed and printed, and a program may ask for that again and again: a tuple must be flat and short."""
    if type(key) in (str, Name):  # which remember their hash
        return key
    flat = key if type(key) is tuple else (key,)
    if len(flat) > MOST_ITEMS or not all(type(n) in (str, int, float, bool, bytes, type(None)) for n in flat):
        raise ValueError(f"a key is no text or number, nor up to {MOST_ITEMS} of them")
    if sum(len(each) for each in flat if type(each) in (str, bytes)) > MOST_LETTERS:
        raise ValueError(f"a key has more than {MOST_LETTERS} letters")
    return key

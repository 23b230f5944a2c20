"""ggml itself: rows of quantised tables, expanded or multiplied by a vector exactly as llama.cpp does it.

Calls the public C API of the libraries that llama-cpp-python ships. A Table is rows in memory that belongs to others (a
mapped file, a numpy array): nothing is copied or dequantised in order to multiply by it.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape

from llamabase.errors import EngineError
from llamabase.gguf.reader import GGUFFile, Tensor

from .library import Owner, physical_cores, start

ALIGNMENT = 64  # bytes; ggml asks for 32
_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_MORE = 10  # tensors of a graph beside those of its tables, at most
_GPUS = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    ]


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
    "ggml_reshape_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_top_k": (c_void_p, [c_void_p, c_void_p, c_int]),
    "ggml_get_rows": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_init_by_type": (c_void_p, [c_int, c_char_p]),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_dev_count": (c_size_t, []),
    "ggml_backend_dev_get": (c_void_p, [c_size_t]),
    "ggml_backend_dev_type": (c_int, [c_void_p]),
    "ggml_backend_dev_description": (c_char_p, [c_void_p]),
    "ggml_backend_dev_name": (c_char_p, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_commit": (c_char_p, []),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


@lru_cache(maxsize=1)
def _ggml() -> Any:
    """These functions, as attributes, of the libraries that llama_cpp has loaded; file names differ by system."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    libraries = []
    for name in ("ggml", "ggml-base"):
        files = (folder / f"{prefix}{name}{end}" for prefix in ("lib", "") for end in (".so", ".dylib", ".dll"))
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise EngineError(f"{folder}: no {name} library; install llama-cpp-python again")
        libraries.append(ctypes.CDLL(str(file)))
    ggml, base = libraries
    # OpenMP's, if ggml is built with an OpenMP that has it.
    functions = SimpleNamespace(omp_pause_resource_all=getattr(ggml, "omp_pause_resource_all", None))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(ggml, name, None) or getattr(base, name)
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions


def release_threads() -> None:
    """End the threads that compute for this one; they start again when it computes again.

    OpenMP keeps such threads for each thread that ever computed, waiting. With more of them than cores, libgomp puts
    threads to sleep at every barrier of whichever thread computes. On two cores that takes a third of the speed of a
    thread that computes after another one did.
    """
    if (pause := _ggml().omp_pause_resource_all) is not None:
        pause(1)  # omp_pause_soft


def build() -> str:
    """The version of ggml that llama.cpp was built with, and llama.cpp's commit."""
    return f"{_ggml().ggml_version().decode()} {_ggml().ggml_commit().decode()}"


def _devices() -> list[Any]:
    """All devices that llama.cpp can compute on, the CPU among them."""
    start()
    return list(map(_ggml().ggml_backend_dev_get, range(_ggml().ggml_backend_dev_count())))


def gpus() -> list[str]:
    """What each GPU that llama.cpp can compute on calls itself."""
    ggml = _ggml()
    return [
        ggml.ggml_backend_dev_description(device).decode("utf-8", "replace")
        for device in _devices()
        if ggml.ggml_backend_dev_type(device) in _GPUS
    ]


def offloading() -> dict[str, Any]:
    """The devices that can take layers of a model, by llama.cpp's names: {"CUDA0": ...}."""
    ggml = _ggml()
    devices = (device for device in _devices() if ggml.ggml_backend_dev_type(device) != _CPU)
    return {ggml.ggml_backend_dev_name(device).decode(): device for device in devices}


def buffer_types() -> dict[str, Any]:
    """The kinds of memory that tensors can be kept in, by llama.cpp's names: {"CPU": ..., "CUDA0": ...}."""
    ggml = _ggml()
    kinds = filter(None, map(ggml.ggml_backend_dev_buffer_type, _devices()))
    return {ggml.ggml_backend_buft_name(kind).decode(): kind for kind in kinds}


def aligned(n_bytes: int) -> np.ndarray:
    """Zeroed memory (uint8) that ggml can use in place."""
    memory = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + n_bytes]


def row_function(type_: GGMLQuantizationType) -> Callable[[int, int, int], object]:
    """ggml's own: (address of a row, address of float32, numbers) expands it, as its CPU get_rows does."""
    if type_ == GGMLQuantizationType.F32:
        return lambda row, out, n: ctypes.memmove(out, row, 4 * n)
    to_float: Any = _ggml().ggml_get_type_traits(int(type_)).contents.to_float
    if not to_float:
        raise EngineError(f"ggml cannot expand rows of type {type_.name}")
    return to_float  # type: ignore[no-any-return]


def dequantizer(type_: GGMLQuantizationType) -> Callable[[np.ndarray, np.ndarray], object]:
    """The same over arrays: (bytes of rows, float32 out)."""
    expand = row_function(type_)
    return lambda rows, out: expand(rows.ctypes.data, out.ctypes.data, out.size)


def quantize_rows(rows: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    """float32 (n x columns) as uint8 (n x bytes of a row), by ggml's own function.

    Raises ValueError unless columns is a whole number of the type's blocks.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty(quant_shape_to_byte_shape(rows.shape, type_), np.uint8)
    _ggml().ggml_quantize_chunk(int(type_), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    return out


class Backend(Owner):
    """ggml's CPU backend, with n_threads or one thread per physical core. `seconds`: wall time spent in it so far."""

    def __init__(self, n_threads: int | None = None) -> None:
        self.handle, self.seconds = None, 0.0
        start()
        ggml = _ggml()
        self.handle = ggml.ggml_backend_init_by_type(_CPU, None)
        if not self.handle:
            raise EngineError("ggml has no CPU backend; install llama-cpp-python again")
        self.device = ggml.ggml_backend_get_device(self.handle)
        registry = ggml.ggml_backend_dev_backend_reg(self.device)
        if address := ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads"):
            ctypes.CFUNCTYPE(None, c_void_p, c_int)(address)(self.handle, n_threads or physical_cores())
        # Kinds of memory in which the CPU keeps tables rearranged for its matrix kernels, up to a null pointer.
        self.packings: list[int] = []
        if address := ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts"):
            kinds = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
            self.packings = list(itertools.takewhile(bool, map(kinds.__getitem__, itertools.count()))) if kinds else []

    def close(self) -> None:
        if self.handle:
            _ggml().ggml_backend_free(self.handle)
            self.handle = None


class Table:
    """A matrix of `type_`, n_rows x n_columns, in memory that stays in its place.

    `rows` is uint8 (n_rows x bytes of a row), aligned as GGUF tensors and `aligned` memory are. With `packs` it never
    changes, and is copied into the order that the processor's matrix kernels like best, if they have one for it.
    """

    def __init__(self, rows: np.ndarray, type_: GGMLQuantizationType, n_columns: int, packs: bool = False) -> None:
        shape = quant_shape_to_byte_shape((len(rows), n_columns), type_)
        if rows.shape != shape or not rows.flags.c_contiguous:
            raise EngineError(f"rows of {n_columns} {type_.name} numbers do not look like {rows.shape} bytes")
        if rows.ctypes.data % 32:
            raise EngineError("ggml needs tables that begin at a multiple of 32 bytes")
        self.rows, self.type, self.n_columns, self.packs = rows, type_, n_columns, packs

    @classmethod
    def of(cls, file: GGUFFile, tensor: Tensor) -> Table:
        """A matrix of a file, memory-mapped and packed: multiplied as llama.cpp does it."""
        rows = np.asarray(np.memmap(file.path, np.uint8, "r", tensor.offset, (tensor.n_rows, tensor.row_bytes)))
        return cls(rows, tensor.type, tensor.shape[0], packs=True)


class _Graph(Owner):
    """A ggml graph that begins with the product of tables and a vector: tables[-1] @ ... @ tables[0] @ vector.

    The columns of each table after the first are the rows of the one before; `n_rows` are taken of the last one.
    """

    def __init__(self, backend: Backend, tables: Sequence[Table], n_rows: int | None = None) -> None:
        self._buffers: list[Any] = []
        self._context = None
        self.backend = backend
        ggml = _ggml()
        n_tensors = 2 * len(tables) + _MORE + 2 * len(backend.packings) * sum(table.packs for table in tables)
        size = n_tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        self._context = ggml.ggml_init(_InitParams(size, None, True))
        self._vector = aligned(4 * tables[0].n_columns).view(np.float32)
        self._memory: list[np.ndarray] = []  # all that the graph uses
        self._graph = ggml.ggml_new_graph(self._context)
        last = self._place(self._tensor(GGMLQuantizationType.F32, tables[0].n_columns), self._vector)
        for i, table in enumerate(tables, 1):
            count = n_rows if n_rows is not None and i == len(tables) else len(table.rows)
            weights = self._packed(table, count, last) if table.packs else None
            if weights is None:
                weights = self._place(self._tensor(table.type, table.n_columns, count), table.rows)
            last = ggml.ggml_mul_mat(self._context, weights, last)
            self._product = aligned(4 * count).view(np.float32)
            self._place(last, self._product)
        self._last = last
        self._compute = ggml.ggml_backend_graph_compute

    def _finish(self, *tensors: Any) -> None:
        """The graph computes these, in this order."""
        for tensor in tensors:
            _ggml().ggml_build_forward_expand(self._graph, tensor)

    def _tensor(self, type_: GGMLQuantizationType, n_columns: int, *n_rows: int) -> Any:
        sizes = [n_columns, *n_rows, 1, 1][:3]
        return _ggml().ggml_new_tensor_3d(self._context, int(type_), *sizes)

    def _place(self, tensor: Any, memory: np.ndarray) -> Any:
        self._memory.append(memory)
        self._buffers.append(_ggml().ggml_backend_cpu_buffer_from_ptr(memory.ctypes.data, memory.nbytes))
        _ggml().ggml_backend_tensor_alloc(self._buffers[-1], tensor, memory.ctypes.data)
        return tensor

    def _packed(self, table: Table, n_rows: int, vector: Any) -> Any:
        """The table's rows rearranged for the matrix kernels; None if there are none for it."""
        ggml = _ggml()
        rows = np.ascontiguousarray(table.rows[:n_rows])
        for kind in self.backend.packings:
            buffer = ggml.ggml_backend_buft_alloc_buffer(kind, rows.nbytes + ALIGNMENT)
            if not buffer:
                continue
            self._buffers.append(buffer)
            tensor = self._tensor(table.type, table.n_columns, n_rows)
            ggml.ggml_backend_tensor_alloc(buffer, tensor, ggml.ggml_backend_buffer_get_base(buffer))
            # As llama.cpp asks: the answer depends on the processor, the type and the shape.
            product = ggml.ggml_mul_mat(self._context, tensor, vector)
            if ggml.ggml_backend_dev_supports_op(self.backend.device, product):
                ggml.ggml_backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)
                return tensor
        return None

    def _run(self, vector: np.ndarray) -> None:
        self._vector[:] = vector
        started = time.perf_counter()
        code = self._compute(self.backend.handle, self._graph)
        self.backend.seconds += time.perf_counter() - started
        if code:
            raise EngineError(f"ggml could not compute a product ({code})")

    def close(self) -> None:
        for buffer in self._buffers:
            _ggml().ggml_backend_buffer_free(buffer)
        self._buffers = []
        if self._context:
            _ggml().ggml_free(self._context)
            self._context = None


class Product(_Graph):
    """tables[-1] @ ... @ tables[0] @ vector, over the first `n_rows` rows of the last table.

    The columns of each table after the first are the rows of the one before.
    """

    def __init__(self, backend: Backend, *tables: Table, n_rows: int | None = None) -> None:
        super().__init__(backend, tables, n_rows)
        self._finish(self._last)

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """float32 (rows of the last table), a view that the next call overwrites."""
        self._run(vector)
        return self._product


class Choice(_Graph):
    """Rows of a table, chosen by the scores that a product of `tables` gives them, and copied.

    The score g * n + i of the product is of the row `row_of[g, i]` (int32, groups x n) of `source`. The rows of the
    `count` greatest scores of each group are copied into `target`, uint8 (groups * count x bytes of a row). They are
    called as `names` (int32, groups x n) says.
    """

    def __init__(
        self,
        backend: Backend,
        *tables: Table,
        source: Table,
        row_of: np.ndarray,
        names: np.ndarray,
        count: int,
        target: np.ndarray,
    ) -> None:
        super().__init__(backend, tables)
        ggml, (n_groups, n) = _ggml(), row_of.shape
        total, self._source, self._target = n_groups * count, source.rows, target
        by_group = ggml.ggml_reshape_2d(self._context, self._last, n, n_groups)
        best = self._place(ggml.ggml_top_k(self._context, by_group, count), aligned(4 * total))

        def looked_up(numbers: np.ndarray) -> tuple[Any, np.ndarray]:
            table, of_best = aligned(4 * numbers.size).view(np.int32), aligned(4 * total).view(np.int32)
            table[:] = numbers.reshape(-1)
            of_all = self._place(self._tensor(GGMLQuantizationType.I32, 1, n, n_groups), table)
            return self._place(ggml.ggml_get_rows(self._context, of_all, best), of_best), of_best

        of_best, self._names = looked_up(names)
        rows, self._rows = looked_up(row_of)
        n_rows, n_bytes = self._source.shape
        self._copies = not n_bytes % 4
        if self._copies:  # as int32, since ggml would expand rows of any other type
            whole = self._place(self._tensor(GGMLQuantizationType.I32, n_bytes // 4, n_rows), self._source)
            chosen = ggml.ggml_reshape_2d(self._context, rows, total, 1)
            rows = self._place(ggml.ggml_get_rows(self._context, whole, chosen), target)
        self._finish(of_best, rows)

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """The names of the chosen rows (int32, groups * count), a view that the next call overwrites."""
        self._run(vector)
        if not self._copies:
            np.take(self._source, self._rows, axis=0, out=self._target, mode="clip")  # mode "raise" would copy twice
        return self._names

"""Pretend to be CuPy, in NumPy: as much as kernels.py, test_gpu.py and benchmarks/gpu.py use."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np


class Array(np.ndarray):
    """NumPy's array with what CuPy's has besides."""

    device = nullcontext(SimpleNamespace(id=0))
    device.compute_capability = "90"

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data, copy_from_device_async=lambda source, n_bytes, stream: None)


class Host(type):
    def __instancecheck__(cls, array):
        return isinstance(array, np.ndarray) and not isinstance(array, Array)


# for a module that asks whether an array is NumPy's
numpy = SimpleNamespace(**vars(np) | {"ndarray": Host("ndarray", (), {})})


class Stream:
    """Captures nothing: a graph of it launches nothing."""

    def __init__(self, non_blocking=False):
        self.capturing = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def begin_capture(self):
        self.capturing = True

    def end_capture(self):
        self.capturing = False
        return SimpleNamespace(launch=lambda stream: None)

    def synchronize(self):
        assert not self.capturing


class Kernel:
    num_regs, local_size_bytes, shared_size_bytes = 1, 0, 0

    def __init__(self, expression, lib):
        self.expression, self.lib = expression, lib

    def __call__(self, grid, block, args):
        """In the emulator of cuda_host.cpp, if there is a library of it."""
        assert all(n > 0 for n in (*grid, *block))
        if self.lib:
            values = [np.asarray(np.uint64(arg.ctypes.data) if isinstance(arg, Array) else arg) for arg in args]
            pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
            sizes = (ctypes.c_int * len(values))(*(value.nbytes for value in values))
            launched = self.lib.launch_expression(
                self.expression.encode(), grid[0], (*grid, 1)[1], block[0], pointers, sizes, len(values)
            )
            assert launched, f"{self.expression}: no such kernel, or its arguments have other sizes"


class Cupy:
    """The module; a name that is not here is NumPy's. lib: where kernels run; without it they do nothing."""

    ndarray = Array
    asnumpy = staticmethod(lambda array: np.array(array))
    get_default_memory_pool = staticmethod(lambda: SimpleNamespace(free_all_blocks=lambda: None))

    def __init__(self, lib=None):
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        properties = {"name": b"no GPU", "l2CacheSize": 1 << 16, "multiProcessorCount": 1}
        self.cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(id=0),
            Event=lambda: event,
            Stream=Stream,
            get_current_stream=lambda: None,
            get_elapsed_time=lambda start, end: 1.0,
            runtime=SimpleNamespace(
                getDeviceProperties=lambda i: properties, runtimeGetVersion=lambda: 0, driverGetVersion=lambda: 0
            ),
        )
        self.random = SimpleNamespace(
            default_rng=lambda seed: SimpleNamespace(standard_normal=_here(np.random.default_rng(seed).standard_normal))
        )
        self.RawModule = lambda **options: SimpleNamespace(get_function=lambda expression: Kernel(expression, lib))

    def __getattr__(self, name):
        found = getattr(np, name)
        return found if isinstance(found, (type, float)) else _here(found)


def _here(function):
    def call(*args, **kwargs):
        return function(*args, **kwargs).view(Array)

    return call

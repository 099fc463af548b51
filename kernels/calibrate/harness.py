"""Compile a CUDA source for sm_90a, launch it, and write the measured numbers with their provenance."""

import argparse
import ctypes
import datetime
import hashlib
import json
import math
import pathlib

import numpy as np

from ..compile import build

SCHEMA = "fasim.calibration/1"
HERE = pathlib.Path(__file__).parent
SM_COUNT_H200 = 132
MAX_SMEM_BYTES = 227 * 1024


def parse_out(description):
    """Parse the one argument that every benchmark takes, `--out DIR`, and create that folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the JSON results")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    return out


def check(result):
    """Return the payload of a CUDA driver call, or raise with the driver's error name."""
    error, *payload = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA driver call failed: {error.name} ({int(error)})")
    return payload[0] if len(payload) == 1 else tuple(payload)


def compile_cubin(source):
    """Compile CUDA C++ to an sm_90a cubin by NVRTC, or find it in the cache of `kernels/compile/build.py`; needs no GPU."""
    return build.build(build.Source("microbenchmark.cu", source, fast_math=True)).cubin


class Module:
    """A loaded cubin. `launch` takes ints (as int64 or device pointers) and torch tensors."""

    def __init__(self, source):
        import torch
        from cuda.bindings import driver

        torch.zeros(1, device="cuda")  # creates the context
        self.driver = driver
        self.source = source
        self.cubin = compile_cubin(source)
        self.handle = check(driver.cuModuleLoadData(self.cubin))
        self.functions = {}

    def function(self, name, smem_bytes):
        """The kernel `name`, allowed to use `smem_bytes` of dynamic shared memory at least, whatever it was asked for before."""
        if name not in self.functions:
            self.functions[name] = check(self.driver.cuModuleGetFunction(self.handle, name.encode())), -1
        function, allowed = self.functions[name]
        if smem_bytes > allowed:
            attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(self.driver.cuFuncSetAttribute(function, attribute, smem_bytes))
            self.functions[name] = function, smem_bytes
        return function

    def registers(self, name):
        """(registers per thread, local-memory bytes per thread) of the kernel `name`."""
        attribute = self.driver.CUfunction_attribute
        function = self.function(name, 0)
        wanted = attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        return tuple(check(self.driver.cuFuncGetAttribute(a, function)) for a in wanted)

    def launch(self, name, grid, threads, args, smem_bytes=0):
        """Enqueue `name` on torch's current stream; every argument is passed as 64 bits."""
        import torch

        values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else int(a) for a in args)
        types = tuple(ctypes.c_void_p if isinstance(a, torch.Tensor) else ctypes.c_longlong for a in args)
        stream = torch.cuda.current_stream().cuda_stream
        check(
            self.driver.cuLaunchKernel(
                self.function(name, smem_bytes), grid, 1, 1, threads, 1, 1, smem_bytes, stream, (values, types), 0
            )
        )


def tensor_map_2d(tensor, box_rows, box_cols):
    """A TMA descriptor in device memory for a row-major fp16 matrix, 128-byte swizzle, as a uint8 tensor."""
    import torch
    from cuda.bindings import driver

    rows, cols = tensor.shape
    encoded = check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            2,
            tensor.data_ptr(),
            [driver.cuuint64_t(cols), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(cols * 2)],
            [driver.cuuint32_t(box_cols), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    words = np.array([int(word) for word in encoded.opaque], dtype=np.uint64)
    return torch.from_numpy(words.view(np.uint8).copy()).cuda()


def provenance(source_file, source):
    """Device, driver, versions, date and source hash: what every result file must carry."""
    import importlib.metadata

    import pynvml
    import torch

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    packages = ("torch", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy")
    return {
        "schema": SCHEMA,
        "device": torch.cuda.get_device_name(0),
        "sm_count": torch.cuda.get_device_properties(0).multi_processor_count,
        "l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size,
        "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        "cuda": torch.version.cuda,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
        "source": source_file,
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "sm_clock_hz_seen": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1_000_000,
        "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, 0),
    }


def write(out, name, source_file, source, results, raw=None):
    """Write `DIR/name.json`; `results` are conclusions, `raw` a modest set of samples behind them."""
    record = provenance(source_file, source) | {"results": results, "raw": raw or {}}
    (out / f"{name}.json").write_text(as_json(record))


def as_json(record):
    """A recording as JSON text. A number that does not exist, such as the correlation of what does not vary, is null."""
    return json.dumps(_plain(record), indent=1, allow_nan=False) + "\n"


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spread(samples):
    """Median, 5th and 95th percentile and count of a set of samples."""
    samples = np.asarray(samples, dtype=np.float64).ravel()
    low, middle, high = np.percentile(samples, [5, 50, 95])
    return {"median": round(middle, 2), "p05": round(low, 2), "p95": round(high, 2), "count": int(samples.size)}


def line(x, y):
    """Least-squares line: slope, intercept and the largest residual."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    slope, intercept = np.polyfit(x, y, 1)
    worst = np.abs(y - slope * x - intercept).max()
    return {"slope": round(slope, 3), "intercept": round(intercept, 2), "worst_residual": round(worst, 2)}

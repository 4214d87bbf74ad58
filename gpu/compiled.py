"""CUDA C++ compiled at run time: NVRTC and the driver through cuda-bindings, which torch's CUDA builds bring along."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

from hsr.errors import BackendUnavailable

OPTIONS = ("--std=c++17", "-default-device", "-prec-div=false", "-prec-sqrt=false")
OVERLAP = driver.CUlaunchAttribute()  # the start of a kernel with the end of the one before, for which it waits itself
OVERLAP.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
OVERLAP.value.programmaticStreamSerializationAllowed = 1


class Kernel:
    """A function of a loaded module, launched with one structure as its only argument."""

    def __init__(self, function: Any, shared: int, device: int) -> None:
        self._function, self._shared, self._device = function, shared, device

    def __call__(self, grid: tuple[int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Launch on the device's current stream; the structure is copied before this returns."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launch = driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = *grid, 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = threads, 1, 1
        launch.sharedMemBytes, launch.hStream = self._shared, torch.cuda.current_stream(self._device).cuda_stream
        launch.attrs, launch.numAttrs = [OVERLAP], 1
        with torch.cuda.device(self._device):
            _checked(driver.cuLaunchKernelEx(launch, self._function, ctypes.addressof(pointers), 0))


def machine_code(name: str, settings: Mapping[str, int], architecture: str) -> bytes:
    """The file ``name`` beside this one, compiled with ``-D`` of the settings.

    Code is kept in the folder that HSR_CACHE_DIR names, by default ~/.cache/hsr-attention, and found there again by
    source, options and compiler; an empty name keeps none, nor does a folder that cannot be written.

    Raises:
        BackendUnavailable: the compiler refuses; the message has its log.
    """
    source = Path(__file__).with_name(name).read_bytes()
    headers = [header.decode() for header in re.findall(rb'^#include "(.+)"', source, re.MULTILINE)]
    texts = [Path(__file__).with_name(header).read_bytes() for header in headers]
    options = [f"--gpu-architecture={architecture}", *OPTIONS]
    options += [f"-D{key}={value}" for key, value in settings.items()]
    wanted = hashlib.sha256(repr((source, texts, options, _checked(nvrtc.nvrtcVersion()))).encode()).hexdigest()
    folder = os.environ.get("HSR_CACHE_DIR", str(Path.home() / ".cache" / "hsr-attention"))
    place = Path(folder) / f"{Path(name).stem}-{wanted[:32]}.cubin"
    if folder and place.is_file():
        return place.read_bytes()
    code = _compiled(name, source, dict(zip(headers, texts, strict=True)), options)
    if folder:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            own = place.with_suffix(f".{os.getpid()}")
            own.write_bytes(code)
            own.replace(place)  # at once: others may be looking for it
    return code


def _compiled(name: str, source: bytes, headers: Mapping[str, bytes], options: Sequence[str]) -> bytes:
    named = [header.encode() for header in headers]
    program = _checked(nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), [*headers.values()], named))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendUnavailable(f"{name} does not compile with {options[0]}: {log.decode()}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, code)
    return code


@cache
def kernel(name: str, function: str, settings: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """The function, compiled for the device and loaded once; ``shared_bytes`` of its file is its shared memory.

    Raises:
        BackendUnavailable: a graph is being captured, which loading would break.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise BackendUnavailable(f"{name} is not loaded yet: make the call once before a CUDA graph captures it")
        torch.cuda.current_stream().synchronize()  # there is a context from here on
        major, minor = torch.cuda.get_device_capability(device)
        module = _checked(driver.cuModuleLoadData(machine_code(name, dict(settings), f"sm_{major}{minor}a")))
        found = _checked(driver.cuModuleGetFunction(module, function.encode()))
        address, size = _checked(driver.cuModuleGetGlobal(module, b"shared_bytes"))
        shared = ctypes.c_int()
        _checked(driver.cuMemcpyDtoH(ctypes.addressof(shared), address, size))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(found, limit, shared.value))
        return Kernel(found, shared.value, device)


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status):
        raise BackendUnavailable(f"CUDA says {status}")
    return values[0] if len(values) == 1 else tuple(values)

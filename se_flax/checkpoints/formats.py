"""Readers of single files: safetensors, NumPy, HDF5, PyTorch."""

import importlib
import mmap
import re
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from typing import IO, Any

import numpy as np
import safetensors

from se_flax.checkpoints.array_file import (
    BFLOAT16,
    MAX_HEADER_BYTES,
    MAX_RATIO,
    ArrayFile,
    InvalidFile,
    LazyArray,
    Source,
    check_count,
    check_name,
    is_raw_bfloat16,
    lazy,
    nbytes,
    one_line,
    raw_bfloat16_notes,
)
from se_flax.checkpoints.prefix import unwrapped
from se_flax.errors import UserError

_CODES = {"BF16": "bfloat16", "BOOL": "bool", "F16": "float16", "F32": "float32", "F64": "float64"}
_CODES |= {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
# Older versions let a crafted file run code even with weights_only=True (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)


def open_safetensors(source: Source) -> ArrayFile:
    """A safetensors file."""
    with source.path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise InvalidFile(f"its header claims {length:,} bytes; allowed: {MAX_HEADER_BYTES:,}")
        check_count(stream.read(length).count(b"{") - 2)  # less the header's and the metadata's
    # safetensors checks that the declared shapes fill the file exactly.
    handle: Any = source.closing.enter_context(safetensors.safe_open(source.path, framework="numpy"))
    arrays = {}
    for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
        piece = handle.get_slice(name)
        dtype = _CODES.get(piece.get_dtype(), piece.get_dtype())
        arrays[name] = lazy(source, name, piece.get_shape(), dtype, partial(handle.get_tensor, name))
    return ArrayFile(arrays, handle.metadata() or {})


def _check_directory(stream: IO[bytes], size: int) -> None:
    """Checks the size of a ZIP archive's directory, which `zipfile` reads whole."""
    stream.seek(max(0, size - 98))
    tail = stream.read(98)
    if len(tail) < 22 or not tail[-22:].startswith(b"PK\x05\x06"):
        raise InvalidFile("this is no whole .npz file, its end is missing; download or save it again")
    end = size - 22
    length = int.from_bytes(tail[-10:-6], "little")
    if tail[-42:-22].startswith(b"PK\x06\x07"):  # archives over 4 GB or with over 65,535 members
        end, length = size - 98, int.from_bytes(tail[40:48], "little")
    if length > min(MAX_HEADER_BYTES, end):
        raise InvalidFile(f"its list of members claims {length:,} bytes; allowed: {MAX_HEADER_BYTES:,}")
    stream.seek(end - length)
    check_count(stream.read(length).count(b"PK\x01\x02"))


def open_npz(source: Source) -> ArrayFile:
    """A NumPy archive: uncompressed or deflated `.npy` members, no pickled objects."""
    stream = source.closing.enter_context(source.path.open("rb"))
    _check_directory(stream, source.size)
    archive = source.closing.enter_context(zipfile.ZipFile(stream))
    members = archive.infolist()
    if sum(info.compress_size for info in members) > source.size:
        raise InvalidFile("its members claim more bytes than the file has; download or save it again")
    arrays: dict[str, LazyArray] = {}
    raw = 0
    for info in members:
        name = info.orig_filename.removesuffix(".npy")
        if name == info.orig_filename or name in arrays:
            what = "occurs twice" if name in arrays else "is no .npy array"
            raise InvalidFile(f"its member {one_line(info.orig_filename)!r} {what}; save it with numpy.savez")
        # Other compressions have no bounded ratio; numpy.savez uses these two.
        if info.flag_bits & 0x41 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InvalidFile(f"array {one_line(name)!r} is encrypted or packed unusually; save it with numpy.savez")
        with archive.open(info) as member:
            # Version 1 limits the header to 64 KB; NumPy writes other versions for structured arrays only.
            if np.lib.format.read_magic(member) != (1, 0):
                raise InvalidFile(f"array {one_line(name)!r} has an unusual header; save it with numpy.savez")
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            header = member.tell()
        raw += is_raw_bfloat16(dtype)
        arrays[name] = lazy(source, name, shape, dtype, partial(_read_npy, archive, info))
        stored = info.file_size == info.compress_size or info.compress_type == zipfile.ZIP_DEFLATED
        plausible = stored and info.file_size <= info.compress_size * MAX_RATIO
        if info.file_size != header + nbytes(arrays[name].shape, dtype) or not plausible:
            raise InvalidFile(
                f"array {name!r} declares shape {one_line(shape)}, which its bytes cannot hold; save it again"
            )
    return ArrayFile(arrays, notes=raw_bfloat16_notes(raw))


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def open_h5(source: Source) -> ArrayFile:
    """An HDF5 file: all datasets of numbers by path; a group with several paths is read once."""
    import h5py  # slow to import, and only this format needs it

    file = source.closing.enter_context(h5py.File(source.path, "r", locking=False))
    arrays: dict[str, LazyArray] = {}
    groups, seen, count, raw = [("", file)], {h5py.h5o.get_info(file.id).addr}, 0, 0
    while groups:
        prefix, group = groups.pop()
        for key in group:
            count += 1
            check_count(count)
            name = prefix + key
            check_name(name)
            if "/" in key or not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise InvalidFile(f"{name!r} is a link that could lead out of the file; save the arrays themselves")
            item = group[key]
            if isinstance(item, h5py.Group):
                address = h5py.h5o.get_info(item.id).addr
                if address not in seen:  # a group can contain itself
                    seen.add(address)
                    groups.append((name + "/", item))
            elif not isinstance(item, h5py.Dataset) or item.shape is None:
                raise InvalidFile(f"{name!r} is no array; save arrays alone")
            elif item.external or item.is_virtual:
                raise InvalidFile(f"array {name!r} lies in other files; save it in this one")
            else:
                raw += is_raw_bfloat16(item.dtype)
                arrays[name] = lazy(source, name, item.shape, item.dtype, partial(_read_h5, source, name, item))
    return ArrayFile(arrays, notes=raw_bfloat16_notes(raw))


def _read_h5(source: Source, name: str, item: Any) -> np.ndarray:
    declared, stored = nbytes(item.shape, item.dtype), item.id.get_storage_size()
    ratio = MAX_RATIO if item.id.get_create_plist().get_nfilters() else 1
    chunk = nbytes(item.chunks or (), item.dtype)
    # Unwritten chunks read as zeros, so a short file can declare any shape. A chunk is read whole.
    if stored > source.size or declared > stored * ratio or chunk > max(declared, 1 << 20):
        raise InvalidFile(
            f"array {name!r} declares shape {item.shape}, which its {stored:,} bytes cannot hold; save it again"
        )
    return item[()]


def open_torch(source: Source) -> ArrayFile:
    """A PyTorch file, read by PyTorch; see `se_flax.checkpoints.files.open_arrays` for its content."""
    try:
        torch = importlib.import_module("torch")
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    except (ImportError, OSError) as error:
        raise UserError(
            f"{source.path} is a PyTorch file, which only PyTorch reads safely, and it is not installed; pip install "
            "torch, or convert the file to .safetensors where it is"
        ) from error
    if version < _SAFE_TORCH:
        raise UserError(
            f"{source.path} is a PyTorch file, and PyTorch {torch.__version__} can be made to run code by one; pip "
            f"install 'torch>={'.'.join(map(str, _SAFE_TORCH))}', or convert the file to .safetensors"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which the user of a published file cannot change
            # PyTorch maps only the ZIP format. It reads the others with the lengths that they declare, for which a file
            # object would allocate memory; a mapped file gives no more bytes than there are.
            zipped = zipfile.is_zipfile(source.path)
            file: Any = source.path if zipped else _mapped(source)
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        # PyTorch's own message advises weights_only=False, which executes code in the file.
        needs = re.search(r"GLOBAL `?([\w.]+)", str(error))
        if needs:
            raise InvalidFile(
                f"it refers to {one_line(needs[1])}, not to arrays alone, and such files can run code; if you trust "
                "it, save only its state dict, or convert that to .safetensors"
            ) from error
        reason = "" if "weights_only" in str(error) else f" ({one_line(error)})"
        raise InvalidFile(
            f"PyTorch finds no plain arrays in it{reason}; download it again, or save a state dict"
        ) from error
    if isinstance(content, Mapping):
        content = unwrapped(content)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise InvalidFile(f"it holds a {type(content).__name__}, not a state dict; give a dictionary of arrays by name")
    check_count(len(content))
    arrays = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
            raise InvalidFile(
                f"{one_line(name)!r} is a {type(value).__name__}, not a plain array; give a state dict alone"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        arrays[name] = lazy(source, name, value.shape, dtype, partial(_read_torch, torch, name, value))
    return ArrayFile(arrays)


def _mapped(source: Source) -> mmap.mmap:
    with source.path.open("rb") as stream:
        return source.closing.enter_context(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _read_torch(torch: Any, name: str, value: Any) -> np.ndarray:
    # With strides of zero a tensor of any shape needs only one stored number.
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise InvalidFile(
            f"array {name!r} declares shape {tuple(value.shape)}, which its bytes cannot hold; save it again"
        )
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:  # not a type of NumPy's own
        return value.view(torch.int16).numpy().view(BFLOAT16)
    return value.numpy().copy()  # not a view of the file

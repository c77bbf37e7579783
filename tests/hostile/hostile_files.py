"""Files that mean harm: what is in them."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GIGABYTE = 2**30
DEPTH = 100_000

Write = Callable[[Path], object]
"""What writes a file."""


class Executed:
    """What a pickle runs that is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


# What is in the files.


def pickles(marker: Path) -> dict[str, Write]:
    """Returns what writes each hostile file of torch.save."""

    def zipped(path: Path, pickled: bytes, kind: int = zipfile.ZIP_STORED, more: str = "") -> None:
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"archive/{name}", content)
            if more:
                archive.writestr(more, "touched")

    def bare(path: Path) -> None:
        path.write_bytes(pickle.dumps({"weight": Executed(marker)}, protocol=2))

    def looped(path: Path) -> None:
        loop: dict[str, Any] = {}
        loop["state_dict"] = loop["model"] = loop["unet"] = loop
        torch.save(loop, path)

    def doubled(path: Path) -> None:
        inner: dict[str, Any] = {"weight": torch.zeros(1)}
        for _ in range(60):
            inner = {"a": inner, "b": inner}
        torch.save(inner, path)

    filled = b"\x80\x02c%s\nbytearray\n(J" + struct.pack("<i", 2**31 - 1) + b"tR."
    name = str(marker.with_name("escaped"))
    return {
        "code": lambda path: torch.save({"weight": Executed(marker)}, path),
        "code in an old pickle": bare,
        "code and a name with ../": lambda path: zipped(
            path, pickle.dumps(Executed(marker), protocol=2), more=f"../../../../../../..{name}"
        ),
        "2 GB of zeros": lambda path: zipped(path, filled % b"builtins"),
        "2 GB of zeros by Python 2's name": lambda path: zipped(path, filled % b"__builtin__"),
        "2 GB of zeros in an old pickle": lambda path: write(path, filled % b"builtins"),
        "256 MB that are compressed": lambda path: zipped(
            path, b"\x80\x02X" + struct.pack("<I", 2**28) + bytes(2**28) + b".", zipfile.ZIP_DEFLATED
        ),
        "a tensor of a trillion elements": lambda path: torch.save({"weight": torch.zeros(1).expand(10**12)}, path),
        "a mapping in itself": looped,
        "2^60 tensors by doubling": doubled,
        "nothing": lambda path: write(path, b""),
        "half a file": lambda path: (torch.save({"weight": torch.zeros(99)}, path), cut(path)),
    }


def safetensors_files() -> dict[str, Write]:
    """Returns what writes each hostile safetensors file."""

    def headed(header: Any, data: int = 16, length: int | None = None) -> Write:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return lambda path: write(path, struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))

    def one(shape: list[int], offsets: list[int]) -> dict[str, Any]:
        return {"dtype": "F32", "shape": shape, "data_offsets": offsets}

    return {
        "a header beyond the file": headed({"a": one([4], [0, 16])}, length=10**6),
        "a header of 2^63 bytes": headed({"a": one([4], [0, 16])}, length=2**63),
        "a tensor beyond the file": headed({"a": one([400], [0, 1600])}),
        "a trillion elements": headed({"a": one([10**12], [0, 4 * 10**12])}),
        "elements whose number overflows": headed({"a": one([2**62, 2**62], [0, 16])}),
        "overlapping tensors": headed({"a": one([4], [0, 16]), "b": one([4], [0, 16])}),
        "offsets that run back": headed({"a": one([4], [16, 0])}),
        "a shape that is not its bytes": headed({"a": one([3], [0, 16])}),
        "negative offsets": headed({"a": one([4], [-16, 0])}),
        "a header that nests": headed(b'{"a":' * DEPTH),
        "a header that is no JSON": headed(b"\xff" * 64),
        "nothing": lambda path: write(path, b""),
        "half a file": lambda path: (save_file({"weight": torch.zeros(999)}, path), cut(path)),
    }


def texts() -> dict[str, Write]:
    """Returns what writes each hostile file of JSON."""
    return {
        "1 GB": lambda path: sparse(path, b"[", GIGABYTE),
        "nested lists": lambda path: write(path, b"[" * DEPTH + b"]" * DEPTH),
        "nested objects": lambda path: write(path, b'{"a":' * DEPTH + b"1" + b"}" * DEPTH),
        "a number of a million digits": lambda path: write(path, b"9" * 10**6),
        "no UTF-8": lambda path: write(path, b'{"a": "\xff\xfe\xff"}'),
        "half of it": lambda path: write(path, b'{"format": 1, "a": [1, 2'),
    }


def pictures() -> dict[str, tuple[str, bytes]]:
    """Returns hostile images with the ending of each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(side: int, rows: int, *more: bytes) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + b"".join(more)
        return (
            b"\x89PNG\r\n\x1a\n"
            + head
            + b"".join(more)
            + chunk(b"IDAT", zlib.compress(bytes(rows)))
            + chunk(b"IEND", b"")
        )

    def tiff(side: int) -> bytes:
        entries = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, side)]
        entries += [(279, 4, 8)]
        body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
        return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + bytes(4)

    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    jpeg = b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\1\x11\0\2\x11\1\3\x11\1\xff\xd9"
    bmp = b"BM" + struct.pack("<IIIIiiHHI", 99, 0, 54, 40, 2**30, 2**30, 1, 24, 0) + bytes(45)
    gif = b"GIF89a\xff\xff\xff\xff\xf7\0\0" + bytes(768) + b",\0\0\0\0\xff\xff\xff\xff\0\x08"
    return {
        "3.6 gigapixels of zeros": (".png", png(60_000, 60_000 * 7501)),
        "a size that the pixels lack": (".png", png(12_000, 100)),
        "a size beyond the limit": (".png", png(2**31 - 1, 100)),
        "256 MB of text": (".png", png(1, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))))),
        "a TIFF that lies": (".tif", tiff(2**30)),
        "a JPEG that lies": (".jpg", jpeg),
        "a BMP that lies": (".bmp", bmp),
        "a GIF that lies": (".gif", gif),
        "PostScript, which Pillow has Ghostscript run": (".png", postscript),
        "nothing": (".png", b""),
    }


def tables(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields hostile tables."""
    import pyarrow
    from pyarrow import parquet

    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2**20, pyarrow.int32()), ["a" * 2**20])
    parquet.write_table(pyarrow.table({"prompt": repeated}), folder / "repeated.parquet")
    yield "a terabyte by repetition", folder / "repeated.parquet"
    parquet.write_table(pyarrow.table({"n": pyarrow.nulls(10**7)}), folder / "empty.parquet")
    yield "ten million rows of nothing", folder / "empty.parquet"
    zeros = pyarrow.array(["\0" * 2**28], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"prompt": zeros}), folder / "zeros.parquet", compression="zstd")
    yield "zeros that are compressed", folder / "zeros.parquet"
    for name in ("t.csv", "t.jsonl"):
        sparse(folder / name, b"prompt\n", GIGABYTE)
        yield "1 GB", folder / name
    write(folder / "cell.csv", b"prompt\n" + b'"' + b"a" * 2**24)
    yield "a cell without an end", folder / "cell.csv"
    write(folder / "deep.jsonl", b"[" * DEPTH)
    yield "nested lists", folder / "deep.jsonl"
    write(folder / "no.parquet", b"PAR1" + bytes(99) + b"PAR1")
    yield "no table", folder / "no.parquet"


SETTINGS = {
    "a Python object": b"reward: !!python/object/apply:os.system ['touch MARKER']",
    "a billion laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 9)) for n in range(97, 110)),
    "nested lists": b"a: " + b"[" * DEPTH,
    "1 GB": None,
}


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def sparse(path: Path, begin: bytes, size: int) -> None:
    """Writes a file that is mostly a hole."""
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path, **values: Any) -> Write:
    """Returns what writes a file of JSON with some of its values changed."""
    return lambda to: to.write_text(json.dumps(json.loads(path.read_text()) | values))


def loras() -> dict[str, Write]:
    """Returns what writes each LoRA that does not fit its UNet."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"

    def pair(down: Any, up: Any, alpha: Any = None, **header: str) -> Write:
        tensors = {f"{layer}.lora_A.weight": torch.as_tensor(down), f"{layer}.lora_B.weight": torch.as_tensor(up)}
        tensors |= {} if alpha is None else {f"{layer}.alpha": torch.as_tensor(alpha)}
        return lambda path: save_file(tensors, path, metadata=header)

    good = torch.zeros(4, 16), torch.zeros(8, 4)
    slow = json.dumps({"unet.alpha_pattern": {"(.*)*(.*)*(.*)*(.*)*!": 1.0}})
    deep = "[" * DEPTH
    return {
        "numbers": pair(1.0, 1.0),
        "a vector": pair(torch.zeros(16), torch.zeros(8)),
        "rank 0": pair(torch.zeros(0, 16), torch.zeros(8, 0)),
        "other inputs": pair(torch.zeros(4, 17), torch.zeros(8, 4)),
        "other outputs": pair(torch.zeros(4, 16), torch.zeros(9, 4)),
        "other ranks": pair(torch.zeros(4, 16), torch.zeros(8, 5)),
        "NaN": pair(torch.full((4, 16), float("nan")), torch.zeros(8, 4)),
        "an alpha that is NaN": pair(*good, float("nan")),
        "an alpha of two numbers": pair(*good, [1.0, 2.0]),
        "a pattern that never ends": pair(*good, lora_adapter_metadata=slow),
        "settings that nest": pair(*good, lora_adapter_metadata=deep),
        "settings that are a list": pair(*good, lora_adapter_metadata="[]"),
        "no layer of the UNet": lambda path: save_file(
            {"unet.x.lora_A.weight": torch.zeros(4, 16), "unet.x.lora_B.weight": torch.zeros(8, 4)}, path
        ),
    }


def erasures(erased: Path) -> dict[str, Write]:
    """Returns what writes each record of an erasure that names what it must not, or is none."""
    record = partial(changed, erased / "erasure.json")
    return {
        "a kind with ../": record(kind="../../weights"),
        "an absolute kind": record(kind="/etc/passwd"),
        "a kind that is code": record(kind="os:system"),
        "a kind that is a list": record(kind=["weights"]),
        "no concept": record(concept=None),
        "a concept of numbers": record(concept={"name": 1, "phrases": [2], "anchor": 3, "preserve": 4}),
        "another format": record(format="overpaint.Erasure/1"),
        "a list": lambda path: path.write_text("[1]"),
    }


def indexes(folder: Path) -> dict[str, Write]:
    """Returns what writes each index that names files elsewhere."""
    outside = folder / "outside.safetensors"
    save_file({"conv_in.weight": torch.zeros(1)}, outside)

    def naming(value: Any) -> Write:
        def write(path: Path) -> None:
            path.with_name(path.name.removesuffix(".index.json")).unlink(missing_ok=True)
            path.write_text(json.dumps({"metadata": {}, "weight_map": value}))

        return write

    return {
        "an absolute name": naming({"a": str(outside)}),
        "a name with ../": naming({"a": "../../outside.safetensors"}),
        "a hidden name": naming({"a": ".outside.safetensors"}),
        "numbers": naming([1]),
        "nothing": naming({}),
    }


def libraries(pipeline: Path) -> dict[str, Write]:
    """Returns what writes each index of a pipeline whose parts would be imported from elsewhere."""
    index = partial(changed, pipeline / "model_index.json")
    return {
        "a module of the working directory": index(tokenizer=["imported_by_name", "Tokenizer"]),
        "a module for a network": index(unet=["imported_by_name", "UNet"]),
        "a module for what is switched off": index(safety_checker=["imported_by_name", "Checker"]),
        "a module of the standard library": index(scheduler=["os", "system"]),
        "a number": index(scheduler=[1, "system"]),
        "a pipeline of its own": index(_class_name=["imported_by_name", "Pipeline"]),
    }


def schedulers(pipeline: Path) -> dict[str, Write]:
    """Returns what writes each scheduler that is none, or takes all memory."""
    config = partial(changed, pipeline / "scheduler" / "scheduler_config.json")
    return {
        "a trillion levels": config(num_train_timesteps=10**12),
        "a text for the levels": config(num_train_timesteps="1000"),
        "a network": config(_class_name="UNet2DConditionModel", block_out_channels=[2**14] * 4),
        "a pipeline": config(_class_name="DiffusionPipeline"),
        "a module": config(_class_name="utils"),
    }


def plans(drawn: Path) -> dict[str, Write]:
    """Returns what writes each manifest of drawn images that names files elsewhere."""
    image = json.loads((drawn / "prompts.json").read_text())["images"][0]
    write = partial(changed, drawn / "prompts.json")
    return {
        "an id with ../": write(images=[image | {"id": "../../outside"}]),
        "an absolute id": write(images=[image | {"id": "/etc/passwd"}]),
        "a number for an id": write(images=[image | {"id": 1}]),
        "no images": write(images=[]),
    }


def made_once(files: Mapping[str, Write], folder: Path) -> dict[str, Write]:
    """Writes each file into a folder, and returns what puts it elsewhere by a link."""
    folder.mkdir(parents=True)
    links = {}
    for number, (what, write) in enumerate(files.items()):
        write(folder / str(number))
        links[what] = partial(os.link, folder / str(number))
    return links

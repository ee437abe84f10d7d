"""Banks changed through HDF5, and files that hold pickles: nothing but the datasets of the head is read."""

import ast
import io
import json
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.forge import (
    SIZE,
    VECTORS,
    read_all,
    read_or_refuse,
    refit,
    refused,
)
from support.golden import GOLDEN, MID, POST, head_of

import tl_latentlens as tll
from tl_latentlens.bank.bank import Bank
from tl_latentlens.errors import BankCorruptError, BankError


def _replace(file: h5py.File, put_there: Callable[[], Any]) -> None:
    file.move(VECTORS, "kept")  # its bytes stay where they are
    put_there()


def external_link(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.__setitem__(VECTORS, h5py.ExternalLink(str(outside), "/secret")))


def soft_link(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.__setitem__(VECTORS, h5py.SoftLink("/../../secret")))


def link_in_a_circle(file: h5py.File, outside: Path) -> None:
    file[f"hooks/{POST}/again"] = file["hooks"]


def virtual_dataset(file: h5py.File, outside: Path) -> None:
    layout = h5py.VirtualLayout((10, 4), "uint16")
    layout[:] = h5py.VirtualSource(str(outside), "secret", (10, 4))
    _replace(file, lambda: file.create_virtual_dataset(VECTORS, layout))


def external_storage(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.create_dataset(VECTORS, (10, 4), "uint16", external=[(str(outside), 0, 80)]))


def gzip(file: h5py.File, outside: Path) -> None:
    array = file[VECTORS][:]
    _replace(file, lambda: file.create_dataset(VECTORS, data=array, chunks=(5, 4), compression="gzip"))


def unknown_filter(file: h5py.File, outside: Path) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((10, 4))
    properties.set_filter(31337, h5py.h5z.FLAG_OPTIONAL, (1, 2, 3))
    space = h5py.h5s.create_simple((10, 4))
    _replace(file, lambda: h5py.h5d.create(file.id, VECTORS.encode(), h5py.h5t.NATIVE_UINT16, space, properties))
    file[VECTORS].id.write_direct_chunk((0, 0), b"nonsense", 0)


def resized(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.create_dataset(VECTORS, (1000, 4), "uint16", maxshape=(None, 4)))


def retyped(file: h5py.File, outside: Path) -> None:
    _replace(file, lambda: file.create_dataset(VECTORS, data=[b"text"] * 10, dtype=h5py.string_dtype()))


def attribute_changed(file: h5py.File, outside: Path) -> None:
    file.attrs["hook_names"] = json.dumps(["other"])


def thousands_of_attributes(file: h5py.File, outside: Path) -> None:
    for i in range(2000):
        file.attrs[f"a{i}"] = i


def huge_attribute(file: h5py.File, outside: Path) -> None:
    file[VECTORS].attrs["huge"] = np.zeros(60_000, np.uint8)


def attribute_not_utf8(file: h5py.File, outside: Path) -> None:
    kind = h5py.h5t.TypeID.copy(h5py.h5t.C_S1)
    kind.set_size(4)
    kind.set_cset(h5py.h5t.CSET_UTF8)
    del file.attrs["model"]
    attribute = h5py.h5a.create(file.id, b"model", kind, h5py.h5s.create(h5py.h5s.SCALAR))
    attribute.write(np.array(b"\xff\xfe{\x80", "S4"), kind)


TAMPERINGS = [
    external_link,
    soft_link,
    link_in_a_circle,
    virtual_dataset,
    external_storage,
    gzip,
    unknown_filter,
    resized,
    retyped,
    attribute_changed,
    thousands_of_attributes,
    huge_attribute,
    attribute_not_utf8,
]


@pytest.fixture(params=TAMPERINGS, ids=lambda tamper: tamper.__name__)
def tampered(request: pytest.FixtureRequest, path: Path) -> Path:
    """A bank changed through HDF5; what it leads to is a pipe, which blocks whoever opens it."""
    os.mkfifo(path.with_name("pipe"))
    with h5py.File(path, "r+") as file:
        request.param(file, path.with_name("pipe"))
    return path


def test_a_bank_changed_through_hdf5_is_refused(tampered: Path) -> None:
    refused(tampered, r"a\.h5: metadata does not match its checksum")


def test_no_link_or_filter_is_followed_and_hdf5_never_asked(
    tampered: Path, original: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refit(tampered)

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("HDF5 was asked")

    for module, name in ((h5py, "File"), (h5py.h5f, "open"), (h5py.h5d, "open"), (h5py.h5o, "open"), (h5py.h5g, "open")):
        monkeypatch.setattr(module, name, asked)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for the pipe"))
    signal.alarm(20)
    try:
        assert read_all(tampered) == original
        index = tll.ContextualIndex(tampered, device="cpu")
        found = index.search(torch.tensor([0.5, -0.5, 0.5, -0.5])).neighbors()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert found[0].similarity == 1
    assert found[0].context == Bank.open(GOLDEN).row(5).context()


def test_nothing_but_the_datasets_of_the_head_is_read(path: Path, original: dict[str, Any]) -> None:
    data = path.read_bytes()
    kept = bytearray(b"\xff" * len(data))
    for start, n_bytes in [(0, SIZE), *((place.offset, place.n_bytes) for place in head_of(path).datasets.values())]:
        kept[start : start + n_bytes] = data[start : start + n_bytes]
    path.write_bytes(kept)
    refused(path, "metadata does not match its checksum")
    refit(path)
    assert read_all(path) == original


def test_the_head_decides_what_is_read(path: Path) -> None:
    """Two datasets of one shape, exchanged in the head alone: read as it says, and the blocks' checksums tell."""
    bank, head = Bank.open(GOLDEN), head_of(path)
    norms = [f"hooks/{name}/norms" for name in (POST, MID)]
    refit(path, replace(head, datasets=head.datasets | dict(zip(norms, (head.datasets[n] for n in norms[::-1]), strict=True))))
    opened = Bank.open(path)
    assert opened.norms(POST).tolist() == bank.norms(MID).tolist()
    with pytest.raises(BankCorruptError, match="block 0"):
        opened.verify()
    with pytest.raises(BankCorruptError, match="block 0"):
        tll.ContextualIndex(path, device="cpu")


# No pickle


def package_files() -> list[Path]:
    return sorted(Path(tll.__file__).parent.rglob("*.py"))


def test_the_package_never_unpickles() -> None:
    unsafe = {"pickle", "_pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "pandas.io.pickle"}
    assert len(package_files()) > 20
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Call):
                called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("eval", "exec"), (path, node.lineno)
                assert not called.endswith("read_pickle"), (path, node.lineno)
                assert keywords.get("allow_pickle", "False") == "False", (path, node.lineno)
                if called == "torch.load":
                    assert keywords.get("weights_only") == "True", (path, node.lineno)
            assert not {name.partition(".")[0] for name in names} & unsafe, (path, node.lineno)


class _Touches:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_file_is_no_bank_and_is_not_unpickled(tmp_path: Path) -> None:
    mark, path = tmp_path / "unpickled", tmp_path / "a.h5"
    saved, array = io.BytesIO(), io.BytesIO()
    torch.save(_Touches(mark), saved)
    np.save(array, np.array([_Touches(mark)], object), allow_pickle=True)
    for data in (pickle.dumps(_Touches(mark)), pickle.dumps(_Touches(mark), 0), saved.getvalue(), array.getvalue()):
        path.write_bytes(data)
        for load in (Bank.open, lambda path: tll.ContextualIndex(path, device="cpu")):
            with pytest.raises(BankError, match=r"a\.h5: is not a tl-latentlens bank"):
                load(path)
        path.write_bytes(GOLDEN.read_bytes()[:SIZE] + data.ljust(2**15, b"\0"))
        refused(path, "metadata does not match its checksum")
        refit(path)
        read_or_refuse(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Touches(mark)))
    assert mark.exists()
